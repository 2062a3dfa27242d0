"""Feature maps that are more than elementwise: Performer's random features and Hedgehog's learned ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnzoo.ops.linear.hedgehog import hedgehog_features


class RandomFeatures(nn.Module):
    """FAVOR+, positive orthogonal random features (Performer, arXiv 2009.14794).

        map(x) = exp(w_m . x' - |x'|^2 / 2), m = 1 ... M, with x' = sqrt(scale) x

    so that `map(q) . map(k) / M` is in the mean exp(scale * q . k). Against overflow a query's features are divided by
    their largest, and all keys' by one constant; both cancel in a normalised result, and in that only.

    Args:
        head_dim: size of a head.
        num_features: M; None: `head_dim * ln(head_dim)`, rounded down, the paper's choice.
        scale: of q . k; None: `head_dim ** -0.5`.
        seed: of the directions, the same ones on any device.

    Attribute: `directions [M, head_dim]`, a saved buffer in fp32 (fp64 in a double model).
    """

    directions: Tensor

    def __init__(
        self, head_dim: int, num_features: int | None = None, *, scale: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if num_features is None:
            num_features = max(1, int(head_dim * math.log(head_dim)))
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; it must be at least 1")
        if scale is not None and scale <= 0:
            raise ValueError(f"scale is {scale}; random features need it above 0")
        self.head_dim, self.out_dim = head_dim, num_features
        self.scale = head_dim**-0.5 if scale is None else scale
        self.register_buffer("directions", orthogonal_directions(num_features, head_dim, seed))

    def redraw(self, seed: int) -> None:
        """Take other directions. What a cache has summed up belongs to the old ones."""
        self.directions.copy_(orthogonal_directions(self.out_dim, self.head_dim, seed))

    def forward(self, x: Tensor, *, query: bool) -> Tensor:
        """Features `[..., M]` of `x [..., head_dim]`, in fp32 (fp64 for fp64), of queries or of keys."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype) * math.sqrt(self.scale)
            directions = self.directions.to(dtype)
            exponents = x @ directions.T - x.square().sum(-1, keepdim=True) / 2
            if query:
                return torch.exp(exponents - exponents.amax(-1, keepdim=True).detach())
            # No exponent exceeds |w|^2 / 2; half of that is as far from overflow as most keys are from underflow.
            return torch.exp(exponents - directions.square().sum(-1).max() / 4)


class Hedgehog(nn.Module):
    """Learned softmax features, `[softmax(x W), softmax(-x W)]`, with a W for each head (arXiv 2402.04347).

    The two halves are softmaxes of their own, as in the authors' and LoLCATs' code (2410.10254). W starts as identity.

    Args:
        num_heads: heads of queries.
        num_kv_heads: heads of keys.
        head_dim: size of a head.

    Attributes: `q_weight [num_heads, head_dim, head_dim]`, `k_weight [num_kv_heads, head_dim, head_dim]`.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.out_dim = 2 * head_dim
        self.q_weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))
        self.k_weight = nn.Parameter(torch.eye(head_dim).repeat(num_kv_heads, 1, 1))

    def forward(self, x: Tensor, *, query: bool) -> Tensor:
        """Features `[B, H, S, 2 * head_dim]` of `x [B, H, S, head_dim]`, in x's dtype; the softmaxes run in fp32."""
        return hedgehog_features(x, self.q_weight if query else self.k_weight)


def orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """`[count, dim]` Gaussian directions, orthogonal to one another within each `dim` of them; fp32."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // dim)):
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        rotation, upper = torch.linalg.qr(gaussian)
        rotation = rotation * upper.diagonal().sign()  # uniform over all rotations
        lengths = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        blocks.append(rotation * lengths)
    return torch.cat(blocks)[:count].float()
