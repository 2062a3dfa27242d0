"""One layer after the other to latent attention, for the machinery that walks through a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.calibration import LayerData, LayerMethod
from attnzoo.conversion.families import Projections
from attnzoo.conversion.latent.costs import Inputs, widened
from attnzoo.conversion.latent.factor import RopePart, latent_weights
from attnzoo.conversion.latent.fit import refit_outputs, regress
from attnzoo.conversion.rotary import Rotary
from attnzoo.specs import MLA

Split = Callable[[int, Mapping[str, Tensor]], tuple[Projections, Rotary]]
Norm = Callable[[Tensor], Tensor]


class ToLatent(LayerMethod):
    """Latent attention out of a layer's weights and calibration text.

    Args:
        name: what records call it.
        split: a layer's number and tensors -> its projections and what RoPE turns in them.
        specs: one a layer, with all sizes.
        rope: what rotates; the planes of each layer are its spec's.
        scale: of the scores, layer by layer.
        path: of a layer's attention in the new model, by number.
        refit: whether the output projection is fitted to the text behind the rest.
        steps: of regression of all the layer's weights behind that.
    """

    target = "stream"

    def __init__(
        self,
        name: str,
        split: Split,
        specs: list[MLA],
        rope: RopePart,
        scale: list[float],
        path: Callable[[int], str],
        *,
        refit: bool = True,
        steps: int = 0,
    ) -> None:
        self.name, self._split, self._specs, self._rope = name, split, specs, rope
        self._scale, self._path = scale, path
        self._refit, self._steps = refit, steps
        if not refit and not steps:
            self.target = None  # type: ignore[assignment]  # so that no outputs are gathered

    @property
    def settings(self) -> Mapping[str, object]:
        return {"refit": self._refit, "steps": self._steps, "planes": [spec.rope_frequencies for spec in self._specs]}

    def __call__(self, number: int, tensors: Mapping[str, Tensor], data: LayerData | None) -> dict[str, Tensor]:
        spec, scale = self._specs[number], self._scale[number]
        assert spec.kv_lora_rank and spec.qk_nope_head_dim and spec.rope_frequencies is not None
        p, rotary = self._split(number, tensors)
        p = in_halves(p, rotary)
        inputs = Inputs.unknown(p.q.shape[-1], p.q.device)
        if data is not None:
            found = data.moments.second(), data.attended.second()
            inputs = Inputs(*(moment.to(p.q.device) for moment in found))
        p_wide = without_norms(p, inputs.asking)
        rope = replace(self._rope, planes=tuple(spec.rope_frequencies))
        w = latent_weights(
            p_wide,
            inputs.damped(),
            rope,
            rank=spec.kv_lora_rank,
            nope=spec.qk_nope_head_dim,
            scale=scale,
            q_rank=spec.q_lora_rank,
        )
        if data is not None and self._refit:
            w = refit_outputs(w, data)
        if data is not None and self._steps:
            w = regress(w, data, self._steps)
        dtype = torch.promote_types(p.q.dtype, torch.float32)  # rounded once, where the result is written
        return {f"{self._path(number)}.{name}": t.to(dtype) for name, t in w.named().items()}


def in_halves(p: Projections, rotary: Rotary) -> Projections:
    """The same heads with the dimensions that RoPE turns in front and in halves; scores stay as they are."""
    if not rotary.size or rotary.layout == "half":
        return p
    head_dim = p.q.shape[1]
    order = torch.cat([*rotary.planes(), rotary.free(head_dim)]).to(p.q.device)
    moved = {
        name: t[:, order] for name, t in vars(p).items() if name in ("q", "k", "q_bias", "k_bias") and t is not None
    }
    moved |= {name: t[order] for name, t in vars(p).items() if name in ("q_norm", "k_norm") and t is not None}
    return replace(p, **moved)


def without_norms(p: Projections, moment: Tensor) -> Projections:
    """What per-head norms do to a head of the mean size goes into the weights, since a product cannot hold them.

    Args:
        p: weights; `q_norm` and `k_norm` are what the norms multiply with.
        moment: `[dim + 1, dim + 1]` of the inputs with a 1 behind them.

    Returns:
        Weights in fp32 or wider, without norms.
    """
    wide = {
        name: None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in vars(p).items()
    }
    for part in ("q", "k"):
        weight, bias, gain = getattr(p, part), getattr(p, f"{part}_bias"), getattr(p, f"{part}_norm")
        if gain is None:
            continue
        rows = widened(weight, bias)
        size = torch.einsum("hdx,xy,hdy->h", rows, moment.to(rows), rows).div(rows.shape[1]).sqrt().clamp(min=1e-12)
        rows = rows * gain.double()[..., None] / size[:, None, None]
        wide[part] = rows[..., :-1].to(wide[part])
        wide[f"{part}_bias"] = None if bias is None else rows[..., -1].to(wide[part])
        wide[f"{part}_norm"] = None
    return Projections(**wide)  # type: ignore[arg-type]
