"""`attnzoo.convert` to latent attention: of a model in memory, or folder to folder with one layer in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.conversion import ConversionError, Refusal
from attnzoo.conversion.damage import LayerDamage
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.latent.stock import check_held
from attnzoo.hf.auto import SwappedModel, stock_type
from attnzoo.hf.latent_folder import convert_latent_folder
from attnzoo.hf.latent_plan import plan_latent, run_latent
from attnzoo.hf.latent_stock import as_deepseek
from attnzoo.hf.swap import rebuild
from attnzoo.specs import MLA, Spec

# svd: the closed form; refit: and the outputs fitted to the text; regress: and descent on all weights of the layer.
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"refit": False},
    "refit": {"refit": True},
    "regress": {"refit": True, "steps": 200},
}


def wants_latent(spec: Spec | Sequence[Spec]) -> bool:
    """Whether a conversion's spec is this module's business."""
    return any(isinstance(one, MLA) for one in ([spec] if isinstance(spec, Spec) else spec))


def convert_latent(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    method: str = "auto",
    calibration: object = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Path | PreTrainedModel:
    """`attnzoo.convert` to an MLA.

    A folder becomes a stock deepseek_v3 folder. A model becomes one with `attnzoo`'s latent layers, which is the same
    function and can be trained; with `out` it is written as deepseek_v3 as well.

    Args:
        source: a checkpoint folder or a transformers model.
        spec: an MLA, or a list of them, one a layer; equal ones for deepseek_v3.
        method: one of `METHODS`; "auto" is the last that the calibration allows without regression.
        calibration: token ids `[rows, S]`, integers, without padding; None: by the weights alone.
        out: the folder to write; needed for a folder.
        overwrite: replace `out` if it is a checkpoint.
    """
    if calibration is not None and not (
        isinstance(calibration, Tensor) and calibration.ndim == 2 and not calibration.is_floating_point()
    ):
        raise ValueError(f"calibration must be token ids [rows, S] or None; got {type(calibration).__name__}")
    if method == "auto":
        method = "svd" if calibration is None else "refit"
    if method not in METHODS:
        raise ValueError(f"method for an MLA must be one of auto, {', '.join(METHODS)}; got {method!r}")
    if calibration is None and method != "svd":
        raise ConversionError(f"method {method!r} needs calibration text; only svd goes without")
    fitting = METHODS[method]
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        return convert_latent_folder(source, spec, out, calibration, overwrite=overwrite, **fitting)[0]
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if isinstance(source, SwappedModel):
        raise Refusal("source is a swapped model; convert the model that it was made from")
    if out is not None:
        check_free(out, overwrite=overwrite)
        check_held(source.config.to_dict(), [one for one in [spec] if isinstance(one, MLA)])
    model, _ = convert_latent_model(source, spec, calibration, **fitting)
    if out is not None:
        stock = as_deepseek(model)
        with whole_folder(out, overwrite=overwrite, size=sum(t.nbytes for t in stock.state_dict().values())) as folder:
            stock.save_pretrained(folder)
    return model


def convert_latent_model(
    model: PreTrainedModel, spec: Spec | Sequence[Spec], calibration: Tensor | None = None, **fitting: Any
) -> tuple[PreTrainedModel, list[LayerDamage]]:
    """A copy of `model` with latent attention, ready to be trained, and the damage of each layer.

    Args:
        model: a transformers model that `attnzoo.swap` takes.
        spec: MLA, or a list of them, one a layer.
        calibration: token ids `[rows, S]` without padding; None: by the weights alone.
        fitting: `refit` and `steps`, see `ToLatent`.
    """
    device, dtype = model.device, model.dtype
    config = model.config.to_dict() | {"model_type": stock_type(str(model.config.model_type))}
    plan = plan_latent(config, dict(model.state_dict()), spec, calibration, device)
    made: dict[str, Tensor] = {}
    damages = run_latent(plan, calibration, lambda number, tensors: made.update(tensors), **fitting)

    new = copy.deepcopy(model)
    for number in range(plan.geometry.num_layers):
        new.get_submodule(plan.family.attention_path(number)).to("meta")
    rebuild(new, plan.specs)
    new.load_state_dict({name: t.to(device, dtype) for name, t in made.items()}, strict=False, assign=True)
    return new, damages
