"""New keys for groups of heads: what attention scores can be kept by queries that take the difference into themselves.

A new head's key k' stands for k_j of every old head j of its group. Where k_j ~ M_j k', the queries of head j become
M_j^T q, so that scores stay. Under RoPE, M_j must commute with the turning: in each plane it is a complex number. Where
nothing turns it is any matrix. Norms of heads leave less; see `signed.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.conversion.rotary import Rotary

TINY = 1e-30


@dataclass(frozen=True)
class KeyGroup:
    """The heads that share a new key head: n old KV heads, each with m query heads. All fp64.

    k `[n, D, dim + 1]`, q `[n, m, D, dim + 1]`, biases as the last column.
    moment, asking: second moments `[dim + 1, dim + 1]` of the inputs that keys, and queries, are made of.
    """

    k: Tensor
    q: Tensor
    moment: Tensor
    asking: Tensor


def merge_keys(group: KeyGroup, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The new key head `[D, dim + 1]` and query heads `[n, m, D, dim + 1]` with the least error in the scores."""
    k, q = torch.zeros_like(group.k[0]), torch.zeros_like(group.q)
    first, second = rotary.planes()
    if len(first):
        fitted, m = _rank_one(group, first, second)
        k[first], k[second] = fitted.real, fitted.imag
        turned = m.conj()[:, None, :, None] * torch.complex(group.q[:, :, first], group.q[:, :, second])
        q[:, :, first], q[:, :, second] = turned.real, turned.imag
    free = rotary.free(group.k.shape[1])
    if len(free):
        some = group.q[:, :, free]
        energies = torch.einsum("nmix,xy,nmjy->nij", some, group.asking, some)
        k[free], maps = low_rank(group.k[:, free], energies, group.moment)
        q[:, :, free] = torch.einsum("nij,nmix->nmjx", maps, some)
    return k, q


def low_rank(heads: Tensor, energies: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Heads `[n, d, dim + 1]` by one: k' `[d, dim + 1]` and M `[n, d, d]`.

    They minimise the sum over j of E|C_j^(1/2) (k_j - M_j k') x|^2: a truncated SVD of the stacked, weighted rows.

    energies: C_j `[n, d, d]`, what meets head j's outputs: the queries' second moment, or W_O^T W_O for values.
    """
    n, d, _ = heads.shape
    roots, inverses = _root(energies)
    rows = (roots @ heads).flatten(0, 1)  # [n * d, dim + 1]
    top = torch.linalg.eigh(rows @ moment @ rows.t()).eigenvectors[:, -d:]  # [n * d, d]
    new, maps = top.t() @ rows, inverses @ top.unflatten(0, (n, d))
    # New dimensions as large as the old heads' are in the mean; the maps take the rest, and the product stays.
    old, size = rms(heads, moment).square().mean().sqrt(), rms(new, moment)
    factor = torch.where(size > 1e-9 * old, old / size.clamp_min(TINY), torch.ones_like(size))
    return new * factor[:, None], maps / factor


def rms(rows: Tensor, moment: Tensor) -> Tensor:
    """sqrt of E|row x|^2 for rows `[..., dim + 1]`."""
    squares = ((rows @ moment.to(rows.dtype)) * rows.conj()).real.sum(-1)
    return squares.clamp_min(0).sqrt()


def plane_energies(group: KeyGroup, first: Tensor, second: Tensor) -> Tensor:
    """E|q|^2 in each plane over a KV head's queries: `[n, planes]`."""
    return sum(rms(group.q[:, :, dims], group.asking).square().sum(1) for dims in (first, second))  # type: ignore[return-value]


def _rank_one(group: KeyGroup, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Complex k' `[planes, dim + 1]` and m `[n, planes]`, minimising sum_j w_j E|z_j x - m_j k' x|^2 plane by plane.

    z_j is the old key's plane as a complex row, w_j the energy of the queries in it: the best of rank 1 by the SVD of
    the weighted rows, here by eigenvectors of their n x n products.
    """
    z = torch.complex(group.k[:, first], group.k[:, second]).transpose(0, 1)  # [planes, n, dim + 1]
    root = plane_energies(group, first, second).t().sqrt()  # [planes, n]
    rows = root[..., None] * z
    top = torch.linalg.eigh(rows @ group.moment.to(z.dtype) @ rows.mH).eigenvectors[..., -1]  # [planes, n]
    k = torch.einsum("pn,pnx->px", top.conj(), rows)
    m = torch.where(root > 0, top / root.clamp_min(TINY), torch.zeros_like(top))
    # The size goes to the queries, so that the new keys are as large as the old ones were.
    size = rms(z, group.moment).square().mean(1).sqrt() / rms(k, group.moment).clamp_min(TINY)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return k * size[:, None], (m / size[:, None]).t()


def _root(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of symmetric matrices, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(matrices)
    root = values.clamp_min(0).sqrt()
    kept = root > 1e-7 * root.amax(-1, keepdim=True)
    inverse = torch.where(kept, 1 / root.clamp_min(TINY), torch.zeros_like(root))
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT
