"""A conversion on calibration text, or one whose damage is measured on text: from a plan to new attention weights."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion import ConversionError
from attnzoo.conversion.calibration import Progress
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.heads import MergeHeads
from attnzoo.conversion.plan import Plan
from attnzoo.hf.calibration import convert_layers
from attnzoo.hf.calibration_measure import measure
from attnzoo.hf.calibration_stage import Stage


def convert_on_text(
    plan: Plan,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    method: MergeHeads,
    calibration: Tensor | None,
    held_out: Tensor | None,
    *,
    finished: Callable[[int], Mapping[str, Tensor] | None],
    keep: Callable[[int, Mapping[str, Tensor]], None],
    judge: bool = True,
    spill: Path | None = None,
    progress: Progress | None = None,
) -> Damage:
    """Convert all layers, hand each to `keep`, and say what it cost; without `judge`, the predictions stay unmeasured.

    Args:
        plan, config: of the conversion; the original's config.json.
        weights: the original's tensors by name.
        method: what to do.
        calibration, held_out: token ids `[rows, S]`; not both None.
        judge: whether to measure what the model says of the text, too.
        finished, keep, spill, progress: as for `convert_layers`.

    Raises:
        ConversionError: where the model cannot be run on text, or the ids are not its.
    """
    start = time.perf_counter()
    if plan.family.attentions(plan.geometry) != plan.geometry.num_layers:
        raise ConversionError(f"text runs through causal language models only, not {plan.family.model_type}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = weights[next(iter(plan.layers[0].weights.values()))].dtype
    dtype = computing(stored, device)
    original, new = (
        Stage(
            one,
            tensors,
            family.base + family.attention,
            device=device,
            dtype=dtype,
            code=family.code if moved else None,
        )
        for one, tensors, family, moved in (
            (config, weights, plan.family, False),
            (plan.config, _Moved(plan, weights), plan.holder, True),
        )
    )
    for text in (calibration, held_out):
        if text is not None:
            _check_ids(text, config)
    layers, walk = convert_layers(
        original,
        new,
        method,
        lambda number: {word: weights[name] for word, name in plan.layers[number].sources.items()},
        calibration,
        held_out,
        finished=finished,
        keep=keep,
        storage=stored,
        spill=spill,
        progress=progress,
    )
    before, after, divergence, tokens = measure(original, new, walk) if judge else (math.nan, math.nan, math.nan, 0)
    a_head = 2 * plan.geometry.num_layers * plan.geometry.head_dim * stored.itemsize
    return Damage(
        method=method.name,
        layers=layers,
        tokens=tokens,
        held_out=held_out is not None,
        cross_entropy_before=before,
        cross_entropy=after,
        kl=divergence,
        kv_bytes_before=a_head * plan.geometry.num_kv_heads,
        kv_bytes=a_head * plan.target.num_kv_heads,
        seconds=time.perf_counter() - start,
    )


def key_of(
    plan: Plan, config: Mapping[str, Any], method: MergeHeads, calibration: Tensor | None, files: list[Path]
) -> str:
    """What converted layers depend on, as a digest."""
    digest = hashlib.sha256()
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    what = [dict(config), plan.spec.to_dict(), method.name, dict(method.settings), state]
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    if calibration is not None:
        digest.update(str(tuple(calibration.shape)).encode() + calibration.numpy().tobytes())
    return digest.hexdigest()


def computing(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What layers compute in: on a CPU, half precision saves no time that is worth its error."""
    return stored if device.type == "cuda" else torch.promote_types(stored, torch.float32)


def _check_ids(text: Tensor, config: Mapping[str, Any]) -> None:
    low, high, size = int(text.min()), int(text.max()), config.get("vocab_size")
    if low < 0 or (isinstance(size, int) and high >= size):
        raise ConversionError(f"token ids must be from 0 to {size} - 1, the model's vocabulary; got {low} to {high}")


class _Moved(Mapping[str, Tensor]):
    """What the new model has besides the attention weights."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor]) -> None:
        self._moves, self._weights = plan.moves, weights

    def __getitem__(self, name: str) -> Tensor:
        move = self._moves[name]
        return move.make(*(self._weights[source] for source in move.sources))

    def __iter__(self) -> Iterator[str]:
        return iter(self._moves)

    def __len__(self) -> int:
        return len(self._moves)
