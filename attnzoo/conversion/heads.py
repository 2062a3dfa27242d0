"""Fewer KV heads as a `LayerMethod`: the closed forms, and what is fitted behind them."""

from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.aligned import aligned
from attnzoo.conversion.calibration import LayerData, LayerMethod, need
from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.families import Config, Projections
from attnzoo.conversion.grouping import Grouping, group_alike
from attnzoo.conversion.merge import METHODS, merge_heads
from attnzoo.conversion.plan import Layer, Plan
from attnzoo.conversion.refit import RIDGE, Named, refit
from attnzoo.conversion.regress import RATE, STEPS, regress
from attnzoo.conversion.svd import Inputs, svd

CALIBRATED = ("svd", "aligned", "refit", "regress")
ALL = (*METHODS, *CALIBRATED)
DAMPING = 1e-4  # of the moments, so that what the text lacks is not thrown away


def check_calibrated(method: str, *, calibrated: bool) -> None:
    """Raise ConversionError for a method that there is not, or that lacks its calibration text."""
    if method not in ALL:
        raise ConversionError(f"method must be one of {', '.join(ALL)}, got {method!r}")
    if method in CALIBRATED and not calibrated:
        raise ConversionError(
            f"method {method!r} needs calibration text and got none; pass calibration=, or take "
            f"{', '.join(METHODS)}, which need none"
        )


class MergeHeads(LayerMethod):
    """Any of `ALL` on a plan's layers.

    Args:
        plan: of the conversion.
        config: the original's config.json.
        name: the method.
        seed: what `random` draws from, and the order of `regress`'s batches.
        grouping: "order" merges neighbours, "similarity" first brings those together that are alike.
        steps: of `regress`.
    """

    def __init__(
        self,
        plan: Plan,
        config: Config,
        name: str,
        *,
        seed: int = 0,
        grouping: Grouping = "order",
        steps: int = STEPS,
    ) -> None:
        check_calibrated(name, calibrated=True)
        if grouping not in ("order", "similarity"):
            raise ConversionError(f"grouping must be 'order' or 'similarity', got {grouping!r}")
        self.name, self._plan, self._config = name, plan, config
        self._seed, self._grouping, self._steps = seed, grouping, steps
        self.target = "same" if name in ("refit", "regress") else None

    @property
    def settings(self) -> Mapping[str, object]:
        numbers = {"damping": DAMPING, "ridge": RIDGE, "rate": RATE, "steps": self._steps}
        return {"seed": self._seed, "grouping": self._grouping, **numbers}

    def __call__(self, number: int, tensors: Mapping[str, Tensor], data: LayerData | None) -> dict[str, Tensor]:
        plan, layer = self._plan, self._plan.layers[number]
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        p = plan.family.split({name: tensors[name] for name in layer.weights}, plan.geometry)
        heads = plan.target.num_kv_heads
        if heads == plan.geometry.num_kv_heads:
            return plan.house(layer, p, tensors)
        if self._grouping == "similarity":
            p = group_alike(p, heads, need(data, "similarity").attended.second(DAMPING))
        if self.name in METHODS:
            return plan.house(layer, merge_heads(p, heads, self.name, self._seed, layer=number), tensors)
        new = self._closed_form(number, p, need(data, self.name))
        if self.name in ("refit", "regress"):
            new = self._fitted(layer, new, tensors, need(data, self.name))
        return plan.house(layer, new, tensors)

    def _closed_form(self, number: int, p: Projections, data: LayerData) -> Projections:
        family, heads = self._plan.family, self._plan.target.num_kv_heads
        inputs = Inputs(data.attended.second(DAMPING), data.moments.second(DAMPING))
        rotary = family.rotary(self._config, number)
        seen = p
        if p.q_norm is not None and p.k_norm is not None:
            offset = family.norm_offset
            seen = replace(seen, q_norm=p.q_norm + offset, k_norm=p.k_norm + offset)
        fit = aligned if self.name == "aligned" else svd
        new = fit(seen, heads, rotary, inputs, centred=family.centred_norm)
        if p.q_norm is not None and p.k_norm is not None:
            k_norm = p.k_norm if p.k_norm.ndim == 1 else new.k_norm
            new = replace(new, q_norm=p.q_norm, k_norm=k_norm)
        return new

    def _fitted(self, layer: Layer, new: Projections, tensors: Mapping[str, Tensor], data: LayerData) -> Projections:
        def named(p: Projections) -> dict[str, Tensor]:
            housed = self._plan.house(layer, p, beside)
            return {name.removeprefix(layer.new_stem): tensor.to(data.device) for name, tensor in housed.items()}

        # A family may fold tensors beside the attention into it; they meet weights in fp32 here.
        beside = {name: tensors[name].to(data.device, torch.float32) for name in layer.beside}
        wide = replace(new, **{f.name: getattr(new, f.name).to(data.device, torch.float32) for f in _present(new)})
        if self.name == "refit":
            fitted = refit(wide, data, named, _output_of(named, wide))
        else:
            fitted = regress(wide, data, named, self._seed, self._steps)
        return replace(fitted, **{f.name: getattr(fitted, f.name).to(getattr(new, f.name)) for f in _present(new)})


def _output_of(named: Named, p: Projections) -> str:
    """The path of the output projection inside the module: whose weight changes with o."""
    before, after = named(p), named(replace(p, o=p.o + 1))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return changed[0].rpartition(".")[0]


def _present(p: Projections) -> list[Field[Any]]:
    return [field for field in fields(p) if getattr(p, field.name) is not None]
