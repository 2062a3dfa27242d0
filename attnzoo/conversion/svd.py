"""Method `svd`: keys plane by plane, values by their best subspace, both weighed by what the text makes of them.

In the spirit of activation-aware low-rank compression (arXiv 2403.07378, 2406.07056), with what RoPE lets pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.planes import KeyGroup, low_rank, merge_keys
from attnzoo.conversion.rotary import Rotary
from attnzoo.conversion.signed import merge_normed_keys

MergeKeys = Callable[[KeyGroup, Rotary], tuple[Tensor, Tensor]]
MergeValues = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What a layer's attention gets: second moments `[dim + 1, dim + 1]`, fp64, with a 1 behind every input.

    moment: of what keys and values are made of; asking: of what queries are made of.
    """

    moment: Tensor
    asking: Tensor


def svd(p: Projections, num_kv_heads: int, rotary: Rotary, inputs: Inputs, *, centred: bool = False) -> Projections:
    """Fewer KV heads with the least error in scores and outputs; what differs between heads moves into q and o.

    Contiguous groups. Exact where the heads of a group are alike up to what q and o can take into themselves: a complex
    factor for each plane that RoPE turns, a matrix for the other dimensions and for the values, a sign or an angle
    behind norms of heads.

    Args:
        p: the layer's weights.
        num_kv_heads: a divisor of the layer's KV heads.
        rotary: what RoPE turns.
        inputs: what the text makes of the layer's inputs; identities where there is no text.
        centred: whether norms of heads subtract the mean.

    Returns:
        New weights of the same dtypes.
    """
    return merged(p, num_kv_heads, rotary, inputs, centred=centred, keys=merge_keys, values=low_rank)


def merged(
    p: Projections,
    num_kv_heads: int,
    rotary: Rotary,
    inputs: Inputs,
    *,
    centred: bool,
    keys: MergeKeys,
    values: MergeValues,
) -> Projections:
    """Group by group: keys by `keys`, or by what norms let pass where there are any; values by `values`."""
    n, m = p.k.shape[0] // num_kv_heads, p.q.shape[0] // p.k.shape[0]
    q = wide(p.q, p.q_bias).unflatten(0, (num_kv_heads, n, m))
    k, v = (wide(*pair).unflatten(0, (num_kv_heads, n)) for pair in ((p.k, p.k_bias), (p.v, p.v_bias)))
    o = p.o.double().permute(1, 0, 2).unflatten(0, (num_kv_heads, n, m))  # [groups, n, m, dim, D]
    parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    for g in range(num_kv_heads):
        group = KeyGroup(k[g], q[g], inputs.moment, inputs.asking)
        if p.k_norm is None:
            key, queries = keys(group, rotary)
        else:
            key, queries = merge_normed_keys(group, rotary, *_norms(p, g, n, m), centred=centred)
        value, maps = values(v[g], torch.einsum("nmxd,nmxe->nde", o[g], o[g]), inputs.moment)
        for name, tensor in (("q", queries), ("k", key), ("v", value), ("o", o[g] @ maps[:, None])):
            parts[name].append(tensor)
    new = {"q": torch.cat(parts["q"]).flatten(0, 1), "k": torch.stack(parts["k"]), "v": torch.stack(parts["v"])}
    changes: dict[str, Tensor | None] = {"o": torch.cat(parts["o"]).flatten(0, 1).permute(1, 0, 2).to(p.o)}
    for name, rows in new.items():
        bias = getattr(p, f"{name}_bias")
        changes |= {name: rows[..., :-1].to(p.k), f"{name}_bias": None if bias is None else rows[..., -1].to(bias)}
    if p.k_norm is not None and p.k_norm.ndim == 2:
        changes["k_norm"] = p.k_norm.double().unflatten(0, (num_kv_heads, n)).mean(1).to(p.k_norm)
    return replace(p, **changes)  # type: ignore[arg-type]


def wide(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weights `[H, D, dim]` with the bias as a last column, fp64."""
    column = torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]
    return torch.cat((weight, column), dim=-1).double()


def _norms(p: Projections, g: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The norms' weights of a group: queries' `[n, m, D]`, keys' `[n, D]`."""
    assert p.q_norm is not None and p.k_norm is not None
    d = p.k.shape[1]
    q, k = p.q_norm.double(), p.k_norm.double()
    q = q.expand(n * m, d) if q.ndim == 1 else q[g * n * m : (g + 1) * n * m]
    return q.unflatten(0, (n, m)), k.expand(n, d) if k.ndim == 1 else k[g * n : (g + 1) * n]
