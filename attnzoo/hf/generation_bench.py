"""One contestant of `attnzoo bench generation`: a mechanism, ours or transformers', in a process of its own.

    python -m attnzoo.hf.generation_bench ours GQA-8 --batches 1 16 --length 8192 --lock FILE

prints a JSON line for each batch. Processes set up side by side, and each times alone (a lock on FILE).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache, StoppingCriteria

from attnzoo.caches import RecurrentStateCache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.hf.generation_build import cache_for
from attnzoo.hf.generation_cache import HeldCache, HeldLayer
from attnzoo.hf.generation_graph import Step, graphed
from attnzoo.hf.recurrent_cache import RecurrentLayer
from attnzoo.hf.swap import swap
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA, MLA, Linear

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
WINDOW = 1024
DEVICE = "cuda"
STEPS = 32
LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
# spec, kind of cache
OURS: dict[str, tuple[Any, Any]] = {
    "MHA": (GQA(), "contiguous"),
    "GQA-8": (GQA(num_kv_heads=8), "contiguous"),
    "MQA": (GQA(num_kv_heads=1), "contiguous"),
    "MLA": (MLA(**LATENT), "contiguous"),
    "window 1k": (GQA(num_kv_heads=8, mask=SlidingWindow(WINDOW)), "rolling"),
    "linear": (Linear(), "contiguous"),
    "int8 GQA-8": (GQA(num_kv_heads=8), "int8"),
}
_DENSE = {"first_k_dense_replace": 16, "q_lora_rank": None, "rope_interleave": False}
# model type, what differs from SHAPE; transformers has no linear attention in this shape and no int8 cache of its own
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MHA": ("llama", {}),
    "GQA-8": ("llama", {"num_key_value_heads": 8}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "MLA": ("deepseek_v3", LATENT | _DENSE | {"head_dim": LATENT["qk_rope_head_dim"]}),
    "window 1k": ("mistral", {"num_key_value_heads": 8, "sliding_window": WINDOW}),
}


def main(argv: list[str]) -> int:
    """Set up, check and time one contestant; a JSON line for each batch."""
    parser = argparse.ArgumentParser("attnzoo.hf.generation_bench", description=main.__doc__)
    parser.add_argument("side", choices=["ours", "transformers"])
    parser.add_argument("mechanism", choices=list(OURS))
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--lock", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    lock = _Lock(options.lock)
    measure = ours if options.side == "ours" else theirs
    with lock.shared():
        model = _model(options.side, options.mechanism)
    for batch in options.batches:
        row = {"side": options.side, "mechanism": options.mechanism, "batch": batch, "length": options.length}
        try:
            row |= measure(model, options.mechanism, batch, options.length, lock)
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:  # what a contestant cannot do is a row too
            row["unavailable"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()
    return 0


@torch.no_grad()
def ours(model: PreTrainedModel, mechanism: str, batch: int, length: int, lock: _Lock) -> dict[str, Any]:
    """Milliseconds a step of `attnzoo.hf.generate`'s loop and of transformers' loop over the graph, and bytes."""
    with lock.shared():
        kind = OURS[mechanism][1]
        cache = cache_for(model, batch, length + STEPS + 16, kind)
        tokens = torch.randint(1, SHAPE["vocab_size"], (batch, 16), device=DEVICE)
        model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
        fill(cache, length)
        error = _error(model, cache, tokens, length)
        step = Step(model, cache, choose=lambda logits: logits.float().argmax(-1), fuse=True)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    with lock.alone():
        graph_ms = _clocked(step)
    step.leave()
    row = {"ms": graph_ms, "error": error, "bytes": _bytes(model, cache, length)}
    with lock.shared(), graphed(model, fuse=True):
        clock = _Clock(lock)
        fill(cache, length)
        _generate(model, cache, batch, length, clock)
    return row | {"generate_ms": clock.ms}


@torch.no_grad()
def theirs(model: PreTrainedModel, mechanism: str, batch: int, length: int, lock: _Lock) -> dict[str, Any]:
    """Milliseconds a step of transformers' `generate` with its static cache and its own compilation."""
    with lock.shared():
        cache = StaticCache(config=model.config, max_cache_len=length + STEPS + 16)
        model(input_ids=torch.ones(batch, 1, dtype=torch.int64, device=DEVICE), past_key_values=cache)
        for layer in cache.layers:
            layer.keys.normal_()  # type: ignore[union-attr]
            layer.values.normal_()  # type: ignore[union-attr]
            layer.cumulative_length.fill_(length)  # type: ignore[union-attr]
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length
        clock = _Clock(lock)
        _generate(model, cache, batch, length, clock)
    return {"generate_ms": clock.ms}


def fill(cache: HeldCache, length: int) -> None:
    """Make every row `length` random tokens long: decoding does not care what they say."""
    for layer in cache.layers:
        assert isinstance(layer, HeldLayer | RecurrentLayer)
        layer.seen = length
        if isinstance(layer, RecurrentLayer):
            assert layer.state is not None
            layer.state._rows.set([length] * layer.state.batch_size)
            layer.state._summed.set([length] * layer.state.batch_size)
            continue
        memory = layer.memory
        assert memory is not None
        held = memory.stored()
        parts = [*held.k, *held.v, *(held.recent.k + held.recent.v if held.recent is not None else ())]
        for part in parts:
            if part.dtype == torch.int8:
                part.random_(-127, 128)
            elif part.shape[-1] == 1:
                part.fill_(0.01)
            else:
                part.normal_()
        memory._rows.set([length] * memory.batch_size)


def _model(side: str, mechanism: str) -> PreTrainedModel:
    """The shape with random weights, in bf16 on the GPU."""
    kind, changes = ("llama", {}) if side == "ours" else PEERS[mechanism]
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    if side == "ours":
        swap(model, OURS[mechanism][0])
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        parameter.detach().fill_(1) if "norm" in name else parameter.detach().normal_(std=0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(DEVICE)
    for module in model.modules():
        if isinstance(getattr(module, "log_decay", None), Tensor):
            raise ValueError("a decay has to be set anew after a model was made without memory")
    return model.eval()


def _generate(model: PreTrainedModel, cache: Any, batch: int, length: int, clock: _Clock) -> None:
    prompt = torch.ones(batch, length + 1, dtype=torch.int64, device=DEVICE)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=clock.first + STEPS,
        do_sample=False,
        stopping_criteria=[clock],
    )


class _Clock(StoppingCriteria):
    """Ends nothing; times the last steps of `generate`, with the GPU to itself. The first steps compile and capture."""

    first = 6

    def __init__(self, lock: _Lock) -> None:
        self.lock, self.calls, self.start, self.ms = lock, 0, 0.0, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.first:
            torch.cuda.synchronize()
            self.lock.take(fcntl.LOCK_EX)
            self.start = time.perf_counter()
        elif self.calls == self.first + STEPS:
            torch.cuda.synchronize()
            self.ms = (time.perf_counter() - self.start) / STEPS * 1e3
            self.lock.take(fcntl.LOCK_UN)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Lock:
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


def _clocked(step: Callable[[], object]) -> float:
    """Milliseconds a call, of `STEPS` calls in a row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1e3


def _error(model: PreTrainedModel, cache: HeldCache, tokens: Tensor, length: int) -> float:
    """The largest difference of a replayed step's logits from those of a step that counts on the host, relative."""
    overwritten = list(_overwritten(cache))
    before = [t.clone() for t in overwritten]
    step = Step(model, cache)
    for at in range(4):
        got = step(tokens[:, at, None])
    got = got.clone()
    step.leave()
    for t, old in zip(overwritten, before, strict=True):
        t.copy_(old)
    for layer in cache.layers:
        layer.seen = length  # type: ignore[union-attr]
    for memory in cache.memories:
        memory._rows.set([length] * memory.batch_size)  # type: ignore[attr-defined]
    positions = torch.full((tokens.shape[0], 1), length, device=DEVICE)
    for at in range(4):
        out = model(input_ids=tokens[:, at, None], position_ids=positions + at, past_key_values=cache)
    want = out.logits.float()
    return float((got.float() - want).abs().max() / want.abs().max())


def _overwritten(cache: HeldCache) -> Iterator[Tensor]:
    """What steps write over: states and rings. Elsewhere they write behind the last token."""
    for memory in cache.memories:
        if isinstance(memory, RecurrentStateCache):
            yield from (t for t in memory.state if t is not None)
        elif isinstance(memory, TokenCache):
            held = memory.stored()
            rings = [held.recent] if held.recent is not None else [held] if held.ring else []
            yield from (part for ring in rings for part in (*ring.k, *ring.v))


def _bytes(model: PreTrainedModel, cache: HeldCache, length: int) -> int:
    """What a step has to move: weights, all but the table of embeddings, and the cache; states both ways."""
    total = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    for memory in cache.memories:
        if isinstance(memory, RecurrentStateCache):
            total += 2 * sum(t.nbytes for t in memory.state if t is not None)
        elif isinstance(memory, TokenCache):
            kept = memory.window if isinstance(memory, RollingCache) else length
            total += memory.bytes_per_token * kept * memory.batch_size
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
