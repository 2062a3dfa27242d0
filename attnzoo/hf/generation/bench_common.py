"""What both sides of `attnzoo bench generation` share: the shape, who may use the GPU when, and the clock."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
WINDOW = 1024
DEVICE = "cuda"
STEPS = 16  # timed at once
ROUNDS = 5  # of which the median counts
FIRST = 6  # steps of `generate` that compile and capture


def room(length: int) -> int:
    """Tokens that a cache must hold to be timed at this length."""
    return length + FIRST + STEPS * ROUNDS + 4


def random_model(kind: str, changes: dict[str, Any], change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    """The shape as a model of this type, changed, with random weights, in bf16 on the GPU."""
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    change(model)
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        parameter.detach().fill_(1) if "norm" in name else parameter.detach().normal_(std=0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(DEVICE)
    for module in model.modules():
        if isinstance(getattr(module, "log_decay", None), Tensor):
            raise ValueError("a decay has to be set anew after a model was made without memory")
    return model.eval()


def clocked_generate(model: PreTrainedModel, cache: Any, batch: int, length: int, lock: Lock) -> float:
    """Milliseconds a step of transformers' `generate` over a cache of `length` tokens a row."""
    clock = _Clock(lock)
    prompt = torch.ones(batch, length + 1, dtype=torch.int64, device=DEVICE)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=FIRST + STEPS * ROUNDS,
        do_sample=False,
        stopping_criteria=[clock],
    )
    return clock.ms


def clocked(step: Callable[[], object]) -> float:
    """Milliseconds a call, of several in a row."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times) / STEPS * 1e3


class _Clock(StoppingCriteria):
    """Ends nothing; times the steps of `generate` after the first ones, with the GPU to itself."""

    def __init__(self, lock: Lock) -> None:
        self.lock, self.calls, self.start, self.times = lock, 0, 0.0, list[float]()

    @property
    def ms(self) -> float:
        """Milliseconds a step."""
        return median(self.times) / STEPS * 1e3

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        timed = self.calls - FIRST
        if timed >= 0 and timed % STEPS == 0:
            torch.cuda.synchronize()
            if timed == 0:
                self.lock.take(fcntl.LOCK_EX)
            else:
                self.times.append(time.perf_counter() - self.start)
            if timed == STEPS * ROUNDS:
                self.lock.take(fcntl.LOCK_UN)
            self.start = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Lock:
    """A file that many may hold while they set up, and one while it times."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def take(self, how: int) -> None:
        """Let go of what is held, and wait for this."""
        fcntl.flock(self.file, fcntl.LOCK_UN)
        fcntl.flock(self.file, how)

    @contextmanager
    def _held(self, how: int) -> Iterator[None]:
        self.take(how)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def shared(self) -> Any:
        """While others set up as well."""
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> Any:
        """While nobody else uses the GPU."""
        return self._held(fcntl.LOCK_EX)
