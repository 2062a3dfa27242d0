"""Keys gathered, frequency by frequency, into few shared planes that RoPE rotates, and the rest, which it does not.

The two dimensions that RoPE rotates together are one complex number, `z = k[f] + i k[f + F]`, and the rotation by a
token's position is a product with a complex phase. So any complex mixture of the heads' planes of one frequency
commutes with it, and is undone exactly in the queries (TransMLA, arXiv 2502.07864, does so with orthogonal rotations of
the same angles). Of each frequency, `k_h = sum over j of m_hj k'_j` with the planes `k'_j` in the order of what they
are worth: the first ones become rope keys, which all heads share; of the others only what does not depend on the
distance can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.latent.costs import Inputs, key_costs, widened


@dataclass(frozen=True)
class Planes:
    """The rotating keys of a layer by frequency (F of them) and by plane (Hk a frequency, the most worth first).

    worth: `[F, Hk]`, what losing the plane costs at the layer's output.
    mixing: `[F, Hk heads, Hk planes]` complex: `k_h = sum over j of mixing[:, h, j] k'_j`.
    rows: `[F, Hk planes, dim + 1]` complex: the weights of `k'_j`, their bias last.
    """

    worth: Tensor
    mixing: Tensor
    rows: Tensor


def planes_of(p: Projections, inputs: Inputs, rotary_dim: int, scale: float) -> Planes:
    """The planes of a layer's rotating keys.

    For each frequency the mixture is the singular value decomposition of the heads' planes, weighted by the inputs'
    second moment on one side and by what an error of each head costs on the other. No shared planes lose less, if
    errors of all phases count alike, as they do behind a rotation.

    Args:
        p: weights of which the first `rotary_dim` dimensions of each head rotate, in halves.
        inputs: of the layer.
        rotary_dim: even; 0: no planes.
        scale: of the scores.
    """
    half = rotary_dim // 2
    k = widened(p.k, p.k_bias)
    z = torch.complex(k[:, :half], k[:, half:rotary_dim]).transpose(0, 1)  # [F, Hk, dim + 1]
    cost = key_costs(p, inputs, scale).diagonal(dim1=-2, dim2=-1)
    cost = ((cost[:, :half] + cost[:, half:rotary_dim]) / 2).T  # [F, Hk]
    # A head that no query asks for costs nothing; it still has to come out again.
    root = cost.clamp(min=1e-12 * float(cost.max()) if cost.numel() else 0.0).clamp(min=1e-30).sqrt()
    gram = z @ inputs.attended.to(z.dtype) @ z.mH
    worth, vectors = torch.linalg.eigh(root[:, :, None] * gram * root[:, None, :])
    worth, vectors = worth.flip(-1).clamp(min=0), vectors.flip(-1)
    return Planes(worth, vectors / root[:, :, None], (vectors.mH * root[:, None, :]) @ z)


def distance_blind(frequencies: Tensor, reach: int) -> Tensor:
    """The best that stands for a rotation by an unknown distance: `E[exp(-i w d)]`, `[F]` complex.

    Near 1 for frequencies that hardly turn within the text, near 0 for fast ones. Distances up to `reach` count as
    1 / (1 + d), since attention is mostly near: better than equal shares, and than the distances that attention has,
    which are mostly those to the first token.

    Args:
        frequencies: `[F]`, radians a token.
        reach: the longest text, in tokens.
    """
    distances = torch.arange(reach, dtype=torch.float64, device=frequencies.device)
    share = 1 / (1 + distances)
    angles = torch.outer(frequencies.double(), distances)
    return torch.complex(angles.cos() @ share, -(angles.sin() @ share)) / share.sum()
