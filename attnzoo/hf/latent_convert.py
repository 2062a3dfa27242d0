"""`attnzoo.convert` to latent attention: of a model in memory, or folder to folder with one layer in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.conversion import ConversionError, Refusal
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.latent.stock import check_held
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.calibration_text import Text, token_rows
from attnzoo.hf.latent_folder import convert_latent_folder
from attnzoo.hf.latent_plan import plan_latent, run_latent
from attnzoo.hf.latent_stock import as_deepseek
from attnzoo.hf.swap import rebuild
from attnzoo.specs import MLA, Spec

# The closed form; that and the outputs fitted to the text; and then descent on all weights of a layer.
METHODS = ("svd", "refit", "regress")


def wants_latent(spec: Spec | Sequence[Spec]) -> bool:
    """Whether a conversion's spec is this module's business."""
    return any(isinstance(one, MLA) for one in ([spec] if isinstance(spec, Spec) else spec))


def convert_latent(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    method: str = "auto",
    calibration: Text | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    held_out: Text | None = None,
    samples: int = 64,
    sample_length: int = 512,
    steps: int = 200,
    report: Callable[[Damage], None] | None = None,
) -> Path | PreTrainedModel:
    """`attnzoo.convert` to an MLA.

    A folder becomes a stock deepseek_v3 folder. A model becomes one with `attnzoo`'s latent layers, which is the same
    function and can be trained; with `out` it is written as deepseek_v3 as well. Calibration text should be as long as
    the text that the model is for: what of the positions is dropped is chosen by its length.

    Args:
        source: a checkpoint folder or a transformers model.
        spec: an MLA, or a list of them, one a layer; equal ones for deepseek_v3.
        method: one of `METHODS`; "auto" is `svd`.
        calibration: as for `attnzoo.convert`; None: by the weights alone.
        out: the folder to write; needed for a folder.
        overwrite: replace `out` if it is a checkpoint.
        held_out, samples, sample_length, report: as for `attnzoo.convert`.
        steps: of regression in each layer, for `regress`.

    Raises:
        ConversionError: before anything is written; Refusal where deepseek_v3 does not hold what `out` asks for.
    """
    if method == "auto":
        method = "svd"
    if method not in METHODS:
        raise ConversionError(f"method for an MLA must be one of auto, {', '.join(METHODS)}; got {method!r}")
    if calibration is None and method != "svd":
        raise ConversionError(f"method {method!r} needs calibration text and got none; only svd goes without")
    fitting = {"refit": method != "svd", "steps": steps if method == "regress" else 0}
    tokenizer = Path(source) if isinstance(source, str | Path) else None
    learned, judged = (
        None if text is None else token_rows(text, tokenizer, samples, sample_length, name=name)
        for text, name in ((calibration, "calibration"), (held_out, "held_out"))
    )
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        path, damage = convert_latent_folder(source, spec, out, learned, judged, overwrite=overwrite, **fitting)
        _tell(report, damage)
        return path
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if isinstance(source, SwappedModel):
        raise Refusal("source is a swapped model; convert the model that it was made from")
    if out is not None:
        check_free(out, overwrite=overwrite)
        specs = [spec] if isinstance(spec, Spec) else list(spec)
        check_held(source.config.to_dict(), [one for one in specs if isinstance(one, MLA)])
    model, damage = convert_latent_model(source, spec, learned, judged, **fitting)
    if out is not None:
        stock = as_deepseek(model)
        size = sum(tensor.nbytes for tensor in stock.state_dict().values())
        with whole_folder(out, overwrite=overwrite, size=size) as folder:
            stock.save_pretrained(folder)
    _tell(report, damage)
    return model


def convert_latent_model(
    model: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    calibration: Tensor | None = None,
    held_out: Tensor | None = None,
    **fitting: Any,
) -> tuple[PreTrainedModel, Damage | None]:
    """A copy of `model` with latent attention, ready to be trained, and the damage if there is text to measure it on.

    Args:
        model: a transformers model that `attnzoo.swap` takes.
        spec: MLA, or a list of them, one a layer.
        calibration, held_out: token ids `[rows, S]` without padding.
        fitting: `refit` and `steps`, see `ToLatent`.
    """
    config = model.config.to_dict()
    plan = plan_latent(config, dict(model.state_dict()), spec, calibration, model.device)
    made: dict[str, Tensor] = {}
    damage = run_latent(plan, calibration, held_out, lambda number, tensors: made.update(tensors), **fitting)

    new = copy.deepcopy(model)
    for number in range(plan.geometry.num_layers):
        new.get_submodule(plan.family.attention_path(number)).to("meta")
    rebuild(new, plan.specs)
    made = {name: tensor.to(model.device, model.dtype) for name, tensor in made.items()}
    new.load_state_dict(made, strict=False, assign=True)
    return new, damage


def _tell(report: Callable[[Damage], None] | None, damage: Damage | None) -> None:
    if report is not None and damage is not None:
        report(damage)
