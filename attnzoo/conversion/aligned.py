"""Method `aligned`: heads are turned towards one another before their mean is taken (arXiv 2412.20677)."""

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.planes import TINY, KeyGroup
from attnzoo.conversion.rotary import Rotary
from attnzoo.conversion.svd import Inputs, merged

_ROUNDS = 10  # of alternating between the mean and the turns


def aligned(p: Projections, num_kv_heads: int, rotary: Rotary, inputs: Inputs, *, centred: bool = False) -> Projections:
    """Contiguous groups' means of k and v, after the turns that bring the heads closest (generalised Procrustes).

    Turns are orthogonal, in each plane under RoPE; q and o take them back exactly. Arguments and result as for `svd`.
    """
    return merged(p, num_kv_heads, rotary, inputs, centred=centred, keys=_keys, values=_values)


def _keys(group: KeyGroup, rotary: Rotary) -> tuple[Tensor, Tensor]:
    k, q = torch.zeros_like(group.k[0]), torch.zeros_like(group.q)
    first, second = rotary.planes()
    if len(first):
        z = torch.complex(group.k[:, first], group.k[:, second])  # [n, planes, dim + 1]
        new = z[0]
        for _ in range(_ROUNDS):
            products = torch.einsum("npx,xy,py->np", z, group.moment.to(z.dtype), new.conj())
            m = torch.where(products.abs() > 0, products / products.abs().clamp_min(TINY), torch.ones_like(products))
            new = (m.conj()[..., None] * z).mean(0)
        k[first], k[second] = new.real, new.imag
        turned = m.conj()[:, None, :, None] * torch.complex(group.q[:, :, first], group.q[:, :, second])
        q[:, :, first], q[:, :, second] = turned.real, turned.imag
    free = rotary.free(group.k.shape[1])
    if len(free):
        k[free], maps = _turned_mean(group.k[:, free], group.moment)
        q[:, :, free] = torch.einsum("nij,nmix->nmjx", maps, group.q[:, :, free])
    return k, q


def _values(heads: Tensor, energies: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    return _turned_mean(heads, moment)


def _turned_mean(heads: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Heads `[n, d, dim + 1]` -> their mean `[d, dim + 1]` after turning, and the turns back `[n, d, d]`."""
    new = heads[0]
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(heads @ moment @ new.t())
        turns = left @ right  # head ~ turn new
        new = (turns.mT @ heads).mean(0)
    return new, turns
