"""`attnzoo.convert` of some layers to a window or to linear attention, chosen by what each costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnzoo.conversion import ConversionError, Refusal
from attnzoo.conversion.folders import check_free
from attnzoo.conversion.hybrid import HybridDamage, KVBudget, Layers, choose_layers
from attnzoo.conversion.transfer import STEPS
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.blocks import Blocks, sharing
from attnzoo.hf.calibration_progress import progress_bar
from attnzoo.hf.calibration_text import Text, token_rows
from attnzoo.hf.hybrid_build import build, write
from attnzoo.hf.hybrid_measure import damage_alone, damage_together
from attnzoo.hf.hybrid_request import cache_bytes, read_request
from attnzoo.hf.hybrid_transfer import transfer_all
from attnzoo.hf.swap import rebuild
from attnzoo.specs import GQA, Linear, Spec

Report = Callable[[HybridDamage], None]
RANKED = 4096  # tokens; each costs a pass through half of the model for every layer


def wants_hybrid(spec: Spec | Sequence[Spec], layers: Layers | None) -> bool:
    """Whether a conversion is this module's business: not all layers get the same, or linear attention."""
    specs = [spec] if isinstance(spec, Spec) else list(spec)
    masks = {one.mask for one in specs if isinstance(one, GQA)}
    return layers is not None or any(isinstance(one, Linear) for one in specs) or len(masks) > 1


def convert_hybrid(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    layers: Layers | None = None,
    *,
    calibration: Text | None = None,
    held_out: Text | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    method: str = "auto",
    samples: int = 64,
    sample_length: int = 512,
    seed: int = 0,
    steps: int = STEPS,
    report: Report | None = None,
) -> Path | PreTrainedModel:
    """`attnzoo.convert` to a GQA with a mask, or to a Linear, in some layers.

    Args: as of `attnzoo.convert`.

    Returns:
        As `attnzoo.convert`. What a stock class holds (one window, in some layers, of Llama, Mistral, Ministral, Qwen2,
        Gemma2, SmolLM3 ...) is a stock model; anything else is a swapped one, which `attnzoo.hf.export` writes.
    """
    if method != "auto":
        raise ConversionError(f"method must be 'auto' for masks and linear attention, got {method!r}")
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        folder: Path | None = Path(source).expanduser().resolve()
        check_free(out, overwrite=overwrite)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        if torch.cuda.is_available() and (calibration is not None or held_out is not None):
            model.to("cuda")
    elif isinstance(source, PreTrainedModel):
        folder, model = None, source
        if out is not None:
            check_free(out, overwrite=overwrite)
    else:
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if isinstance(model, SwappedModel):
        raise Refusal("source is a swapped model; convert the model that it was made from")
    texts = [
        None if text is None else token_rows(text, folder, samples, sample_length, name=name)
        for text, name in ((calibration, "calibration"), (held_out, "held_out"))
    ]
    new, damage = convert_hybrid_model(model, spec, layers, *texts, seed=seed, steps=steps)
    if report is not None and damage is not None:
        report(damage)
    if out is None:
        return new
    path = write(new, out, folder, overwrite=overwrite)
    return new if folder is None else path


def convert_hybrid_model(
    model: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    layers: Layers | None = None,
    calibration: Tensor | None = None,
    held_out: Tensor | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    ranked: int = RANKED,
) -> tuple[PreTrainedModel, HybridDamage | None]:
    """The new model, and what it cost if there is text to measure it on; arguments as of `convert_hybrid`.

    Each layer alone is measured on about `ranked` tokens of the calibration text, in rows spread evenly over it.
    """
    start = time.perf_counter()
    request = read_request(model, spec, layers)
    if request.asked is None and calibration is None:
        raise ConversionError("layers are chosen by the damage on calibration text; pass calibration=, or list them")
    run = _runnable(model)
    changed = sharing(run)
    rebuild(changed, request.chosen(request.asked or range(request.count)))
    before, after = Blocks(sharing(run), request.family), Blocks(changed, request.family)
    text = calibration if held_out is None else held_out
    length = layers.length if isinstance(layers, KVBudget) else 1 if text is None else text.shape[1]
    old, made = ([one.attention(number) for number in range(request.count)] for one in (before, after))
    old_bytes, new_bytes = cache_bytes(request, old, made, model, length)

    if calibration is not None and request.name == "linear":
        with progress_bar("linear: feature maps") as progress:
            transfer_all(run, after, calibration, steps=steps, seed=seed, progress=progress)
    alone: list[float] = []
    if request.asked is None:
        assert request.choice is not None and calibration is not None
        with progress_bar(f"{request.name}: each layer alone") as progress:
            alone = damage_alone(before, after, _some(calibration, ranked), progress)
        chosen = choose_layers(alone, request.choice, old_bytes, new_bytes)
    else:
        chosen = request.asked
    new = build(model, request, chosen, made)
    if text is None:
        return new, None
    judged = damage_together(before, after, chosen, text)
    kept = sum(new_bytes[number] if number in chosen else old_bytes[number] for number in range(request.count))
    return new, HybridDamage(
        method=request.name,
        layers=judged.layers,
        tokens=judged.tokens,
        held_out=held_out is not None,
        cross_entropy_before=judged.before,
        cross_entropy=judged.after,
        kl=judged.kl,
        kv_bytes_before=round(sum(old_bytes) / length),
        kv_bytes=round(kept / length),
        seconds=time.perf_counter() - start,
        alone=alone,
        changed=chosen,
        length=length,
    )


def _some(rows: Tensor, tokens: int) -> Tensor:
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    return rows[torch.arange(count) * len(rows) // count]


def _runnable(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or on a CPU in a precision that shows what one layer does."""
    if model.device.type != "cpu" or model.dtype.itemsize >= 4:
        return model
    return copy.deepcopy(model).float()
