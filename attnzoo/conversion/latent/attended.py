"""Second moments of a layer's inputs, by token and by the attention that each token receives."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.latent.costs import Inputs
from attnzoo.conversion.moments import Moments

_SCORES = 1 << 24  # at once, so that long rows and many heads fit


class AttendedMoments:
    """Streams a layer's inputs; `result()` is what they were.

    Args:
        p: the layer's weights, in fp32 or wider; the first `2 F` dimensions of a head rotate, in halves.
        frequencies: `[F]`, radians a token.
        scale: of the scores.
    """

    def __init__(self, p: Projections, frequencies: Tensor, scale: float) -> None:
        self._p, self._frequencies, self._scale = p, frequencies, scale
        dim = p.q.shape[-1]
        self._asking = Moments(dim)
        self._attended = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
        self._count = 0.0

    def add(self, x: Tensor) -> None:
        """Count inputs `[rows, S, dim]` without padding; a token attends to itself and those before it in its row."""
        self._asking.add(x)
        for row in x.to(torch.promote_types(x.dtype, torch.float32)):
            share = self._received(row)[:, None]  # [S, 1]
            wide = torch.cat([row, row.new_ones(len(row), 1)], dim=1)
            self._attended += (wide.T @ (share * wide)).to("cpu", torch.float64)
            self._count += float(share.sum())

    def result(self) -> Inputs:
        """The moments, on the CPU; raises ValueError where nothing was added."""
        return Inputs(self._asking.second(), self._attended / max(self._count, 1e-30))

    def _received(self, x: Tensor) -> Tensor:
        """What each of the tokens `[S, dim]` receives of all heads' and queries' attention, `[S]`."""
        p, tokens = self._p, len(x)
        angles = torch.outer(torch.arange(tokens, device=x.device), self._frequencies.to(x.device, x.dtype))
        turn = torch.polar(torch.ones_like(angles), angles)
        k = _turned(_heads(x, p.k, p.k_bias), turn)
        received = x.new_zeros(tokens)
        step = max(1, _SCORES // (tokens * tokens))
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        for first in range(0, len(p.q), step):
            heads = slice(first, first + step)
            q = _turned(_heads(x, p.q[heads], None if p.q_bias is None else p.q_bias[heads]), turn)
            owners = torch.arange(len(p.q), device=x.device)[heads] // (len(p.q) // len(k))
            scores = self._scale * q @ k[owners].mT
            received += scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).sum(dim=(0, 1))
        return received


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[H, S, D]` out of x `[S, dim]`."""
    out = torch.einsum("sx,hdx->hsd", x, weight.to(x))
    return out if bias is None else out + bias[:, None].to(x)


def _turned(heads: Tensor, turn: Tensor) -> Tensor:
    """RoPE on the leading dimensions, in halves; turn `[S, F]` complex."""
    half = turn.shape[-1]
    z = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * turn
    return torch.cat([z.real, z.imag, heads[..., 2 * half :]], dim=-1)
