"""What `scripts/bench_training.py` times: models, tokens, and the loops and the trainer that train on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import attnzoo.hf  # noqa: F401  (registers attn_implementation="attnzoo")
from recipes.compiling import compile_model
from recipes.heads import head_of
from recipes.losses import linear_cross_entropy
from recipes.meters import training_flops
from recipes.module import Uptraining
from recipes.objectives import CE, Objective
from recipes.packed import pack, shifted_labels
from recipes.stages import Stage
from recipes.trainer import build_trainer
from recipes.windows import Windows

if TYPE_CHECKING:
    from bench_training import Measured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, to see that it runs
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


def plain_loop(name: str, case: Mapping[str, Any], compile: str, measured: Measured, steps: int) -> Iterator[None]:
    """What one would write by hand: the model's logits, `F.cross_entropy`, autocast and AdamW."""
    model = build(case["model"], "sdpa")

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets)

    return (yield from loop(model, case, loss, measured, steps))


def recipe_loop(name: str, case: Mapping[str, Any], compile: str, measured: Measured, steps: int) -> Iterator[None]:
    """What the recipe does, on rows instead of packed documents, which not every attention takes."""
    model = build(case["model"], name.removesuffix("-rows"))
    head = head_of(model)
    compile_model(model, compile, device=DEVICE)

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), targets=targets, **head._asdict()) / (targets != -100).sum()

    return (yield from loop(model, case, loss, measured, steps))


def loop(
    model: PreTrainedModel,
    case: Mapping[str, Any],
    loss_of: Callable[[dict[str, Tensor], Tensor], Tensor],
    measured: Measured,
    steps: int,
) -> Iterator[None]:
    """Trains, a step for each value, without ever waiting for the device; all tokens lie there."""
    numbers = []
    batches = [rows_of(case, pieces) for pieces in pieces_of(case, steps)]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMIZER)
    for batch in batches:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(*batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        numbers.append(torch.stack([loss.detach(), norm]))
        del loss
        yield
    measured.loss, measured.gradient_norm = torch.stack(numbers).t().tolist()


def with_trainer(
    case: Mapping[str, Any], compile: str, measured: Measured, turns: int, turn: int, between: Callable[[], None]
) -> None:
    """The recipe as `attnzoo uptrain` runs it: Lightning's trainer, the module, packed batches from the host.

    Between its turns it lets others have theirs.
    """
    steps = turns * turn

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            measured.tick()
            if trainer.global_step % turn == 0:
                measured.end()
                between()
                if trainer.global_step < steps:
                    measured.begin()

    class Keep(DummyLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            measured.loss.append(metrics["train/loss"])
            measured.gradient_norm.append(metrics["train/gradient_norm"])

    measured.begin()
    model = build(case["model"], "attnzoo")
    head_of(model)
    compile_model(model, compile, device=DEVICE)
    optimizer = {**OPTIMIZER, "method": "adamw", "schedule": "constant", "warmup": 0.0, "final": 1.0}
    stage = Stage("bench", 0, steps, (CE(),), "all", optimizer)
    module = Uptraining(model, [stage], [Objective(stage.terms)], gradient_clip_norm=CLIP)
    trainer = build_trainer(
        {
            **{"accelerator": DEVICE, "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "bf16-mixed"},
            **{"log_every_n_steps": 1, "progress_bar": False, "reshard_after_forward": True},
            "devices": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        },
        max_steps=steps,
        callbacks=[Watch()],
        loggers=[Keep()],
    )
    batches = [pack(pieces) for pieces in pieces_of(case, steps)]
    trainer.fit(module, train_dataloaders=Windows(_Loader(batches), steps=steps, pin=DEVICE == "cuda"))


class _Loader:
    """Batches in order, as the training data gives them."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("a benchmark does not resume")


def build(config: Mapping[str, Any], attention: str) -> PreTrainedModel:
    """In fp32 on the GPU; the same weights for every attention."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config_of(config), attn_implementation=attention, dtype=torch.float32)
    return model.train()


def config_of(sizes: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True)


def pieces_of(case: Mapping[str, Any], steps: int) -> Iterator[list[np.ndarray]]:
    """The documents of each step, row by row; small ids are frequent, so that there is something to learn."""
    draw = np.random.default_rng(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    for _ in range(steps):
        pieces = []
        for _ in range(case["rows"]):
            ids = (draw.random(case["length"]) ** 3 * case["model"]["vocab_size"]).astype(np.int64)
            cuts = draw.random(case["length"] - 1) < 1 / case.get("documents", math.inf)
            pieces += np.split(ids, np.flatnonzero(cuts) + 1)
        yield pieces


def rows_of(case: Mapping[str, Any], pieces: list[np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
    """The same as rows `[rows, length]` on the device, and the targets `[rows * length]`.

    Positions, by which transformers tells documents apart, are given only where there are several in a row.
    """
    packed = {name: t.to(DEVICE) for name, t in pack(pieces).items()}
    inputs = {"input_ids": packed["input_ids"].view(case["rows"], -1)}
    if "documents" in case:
        inputs["position_ids"] = packed["position_ids"].view(case["rows"], -1)
    return inputs, shifted_labels(packed)


def flops(case: Mapping[str, Any]) -> float:
    """Of a token's forward and backward, as the recipe's meters count them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(case["model"]))
    found = training_flops(model, case["length"])
    assert found is not None
    return found
