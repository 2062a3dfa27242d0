"""What an error in a key or a value costs at the layer's output: the measure of all that is kept and dropped here.

With scores s = scale * q . k, an error dk of the keys moves the output by sum_j a_j (ds_j - mean ds) W_O v_j, and an
error dv of the values by sum_j a_j W_O dv_j. For errors that differ from key to key, both are sum_j a_j^2 times

    keys      scale^2 * E|W_O (v - E v)|^2 * E|q . dk|^2
    values    E|W_O dv|^2

so that keys and values are measured by one rule, without a knob between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections


@dataclass(frozen=True)
class Inputs:
    """Second moments of a layer's attention inputs x, with a 1 behind x: `[dim + 1, dim + 1]`, fp64.

    asking: over all tokens. attended: over tokens in proportion to the attention that they receive. Few tokens receive
    most of it, and they are unlike the others; errors in keys and values count where attention goes.
    """

    asking: Tensor
    attended: Tensor

    @classmethod
    def unknown(cls, dim: int, device: torch.device | str = "cpu") -> Inputs:
        """Without calibration text: every direction alike, around zero."""
        moment = torch.eye(dim + 1, dtype=torch.float64, device=device)
        return cls(moment, moment)

    def damped(self, share: float = 1e-4) -> Inputs:
        """With a little of every direction, so that what the text lacks is not given up for nothing."""
        return Inputs(_damped(self.asking, share), _damped(self.attended, share))


def widened(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight `[..., dim]` and bias `[...]` as one, for inputs with a 1 behind them: `[..., dim + 1]` in fp64."""
    column = torch.zeros_like(weight[..., 0]) if bias is None else bias
    return torch.cat([weight, column[..., None]], dim=-1).double()


def key_costs(p: Projections, inputs: Inputs, scale: float) -> Tensor:
    """What a key error costs, `[Hk, D, D]`: the sum over the queries of each group."""
    kv_heads, group = p.k.shape[0], p.q.shape[0] // p.k.shape[0]
    values, o = widened(p.v, p.v_bias), p.o.double()
    mean = inputs.attended[:, -1]
    spread = values @ (inputs.attended - torch.outer(mean, mean)) @ values.mT  # [Hk, D, D]
    moved = scale**2 * torch.einsum("ohd,hde,ohe->h", o, spread.repeat_interleave(group, dim=0), o)
    queries = widened(p.q, p.q_bias)
    each = moved[:, None, None] * (queries @ inputs.asking @ queries.mT)  # [H, D, D]
    return each.unflatten(0, (kv_heads, group)).sum(1)


def value_costs(p: Projections) -> Tensor:
    """What a value error costs, `[Hk, D, D]`: the sum over the query heads of each group of W_O^T W_O."""
    o = p.o.double()
    return torch.einsum("ohd,ohe->hde", o, o).unflatten(0, (p.v.shape[0], -1)).sum(1)


def _damped(moment: Tensor, share: float) -> Tensor:
    out = moment.clone()
    diagonal = out.diagonal()
    diagonal += share * diagonal[:-1].mean().clamp(min=1e-30)
    return out
