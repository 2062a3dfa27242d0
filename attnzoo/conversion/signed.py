"""New keys behind per-head norms: scales are lost there, so heads can only be turned into one another, and averaged.

A map passes an RMS norm (and its weights behind it) exactly if it keeps lengths and commutes with the weights: in a
plane whose two weights are equal, for queries and for keys, any angle; elsewhere a sign. Norms that subtract a head's
mean let nothing pass but a sign of the whole head.
"""

import torch
from torch import Tensor

from attnzoo.conversion.planes import TINY, KeyGroup, plane_energies, rms
from attnzoo.conversion.rotary import Rotary

_ROUNDS = 20  # of alternating between the new key and the angles; they settle in a few


def merge_normed_keys(
    group: KeyGroup, rotary: Rotary, q_norm: Tensor, k_norm: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """The new key head `[D, dim + 1]` and query heads `[n, m, D, dim + 1]`.

    Args:
        q_norm, k_norm: the norms' weights as they multiply, `[n, m, D]` and `[n, D]`, fp64.
        centred: whether the norms subtract a head's mean.
    """
    first, second = rotary.planes()
    free = rotary.free(group.k.shape[1])
    # Of each head what its norm lets through, taken as one number.
    k = group.k / rms(group.k, group.moment).square().mean(1).sqrt().clamp_min(TINY)[:, None, None]
    sizes = rms(group.q, group.asking).square().mean(2).sqrt().clamp_min(TINY)[..., None, None]
    # A free dimension is a plane whose second row is empty.
    z = torch.cat((torch.complex(k[:, first], k[:, second]), k[:, free].to(torch.complex128)), dim=1)
    asked = KeyGroup(k, group.q / sizes * q_norm[..., None], group.moment, group.asking)
    free_energies = rms(asked.q[:, :, free], group.asking).square().sum(1)
    energy = torch.cat((plane_energies(asked, first, second), free_energies), dim=1)
    knorm = torch.cat(((k_norm[:, first].square() + k_norm[:, second].square()) / 2, k_norm[:, free].square()), dim=1)
    weights = (energy * knorm).t()[..., None]  # [planes, n, 1]
    weights = weights.clamp_min(1e-9 * float(weights.max()))  # keys that no query meets stay what they were
    turns = torch.zeros(z.shape[1], dtype=torch.bool)
    if len(first) and not centred:
        even_q = (q_norm[..., first] == q_norm[..., second]).flatten(0, 1).all(0)
        turns[: len(first)] = even_q & (k_norm[:, first] == k_norm[:, second]).all(0)

    def mapped(products: Tensor) -> Tensor:  # [planes, n] of z_j . k' -> m_j
        angle = torch.where(products.abs() > 0, products / products.abs().clamp_min(TINY), torch.ones_like(products))
        if centred:
            whole = (weights[..., 0] * products.real).sum(0)
            return torch.where(whole < 0, -1.0, 1.0).to(products.dtype).expand_as(products)
        return torch.where(turns[:, None], angle, torch.where(products.real < 0, -1.0, 1.0).to(products.dtype))

    z = z.transpose(0, 1)  # [planes, n, dim + 1]
    moment = group.moment.to(z.dtype)
    new = z[:, 0]
    for _ in range(_ROUNDS):
        m = mapped(torch.einsum("pnx,xy,py->pn", z, moment, new.conj()))
        new = (weights * m.conj()[..., None] * z).sum(1) / weights.sum(1).clamp_min(TINY)
    key, q = torch.zeros_like(group.k[0]), torch.zeros_like(group.q)
    planes = len(first)
    key[first], key[second], key[free] = new[:planes].real, new[:planes].imag, new[planes:].real
    turned = m[:planes].t().conj()[:, None, :, None] * torch.complex(group.q[:, :, first], group.q[:, :, second])
    q[:, :, first], q[:, :, second] = turned.real, turned.imag
    q[:, :, free] = m[planes:].t().real[:, None, :, None] * group.q[:, :, free]
    # As long as the old ones were: the norm takes the length out again, but for its epsilon.
    old = rms(group.k, group.moment).square().mean().sqrt()
    return key * old / rms(key, group.moment).square().mean().sqrt().clamp_min(TINY), q
