"""Keys and values of all heads through one latent: the weights of latent attention out of those of grouped queries.

Keys are cut in two. Some of the pairs of dimensions that RoPE rotates, spread evenly over its frequencies, become the
rope part; its key, which all heads share, is the mean over the KV heads. The rest is no longer rotated. It and the
values are factored together: the truncated SVD of their stacked weights is the nearest product of that rank
(arXiv 2502.14837, uniform selection and joint SVD, without calibration).

Exact without RoPE and per-head norms at full rank; with RoPE always an approximation, to be trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attnzoo.conversion.families import Geometry, Projections
from attnzoo.specs import MLA


@dataclass(frozen=True)
class LatentWeights:
    """Weights of a `MultiHeadLatentAttention` with its linear layers' shapes, and biases where there are any."""

    q: Tensor  # [H * (nope + rope), dim]; of the latent, [H * (nope + rope), q_lora_rank], if there is one
    q_bias: Tensor | None
    q_down: Tensor | None  # [q_lora_rank, dim]
    kv_down: Tensor  # [rank + rope, dim]
    kv_down_bias: Tensor | None
    kv_up: Tensor  # [H * (nope + v), rank]
    o: Tensor  # [dim, H * v]
    o_bias: Tensor | None


def filled(spec: MLA, geometry: Geometry, rotary_dim: int) -> MLA:
    """The spec with its open sizes chosen: heads as wide as they are, half of what rotates, and half of all numbers.

    Raises:
        ValueError: for sizes that the layer's weights cannot be carried over to.
    """
    g = geometry
    rope = spec.qk_rope_head_dim
    if rope is None:
        rope = max(2, rotary_dim // 4 * 2)
    if rotary_dim and rope > rotary_dim:
        raise ValueError(
            f"qk_rope_head_dim must be at most {rotary_dim}, the dimensions that the model rotates: {rope}"
        )
    rest = g.head_dim - (rope if rotary_dim else 0)
    nope = spec.qk_nope_head_dim or max(rest, 1)
    if nope != rest:
        raise ValueError(
            f"qk_nope_head_dim must be {rest} (or None), what is left of the model's heads of {g.head_dim}"
            + (f" with qk_rope_head_dim {rope}" if rotary_dim else "")
            + f"; got {nope}"
        )
    if spec.v_head_dim not in (None, g.head_dim):
        raise ValueError(f"v_head_dim must be {g.head_dim} (or None), as in the model; got {spec.v_head_dim}")
    most = min(g.dim, g.num_kv_heads * (nope + g.head_dim))
    rank = spec.kv_lora_rank or max(1, most // 2)
    if rank > most:
        raise ValueError(f"kv_lora_rank must be at most {most}, the rank of the model's keys and values; got {rank}")
    most = min(g.dim, g.num_heads * (nope + rope))
    if spec.q_lora_rank is not None and spec.q_lora_rank > most:
        raise ValueError(f"q_lora_rank must be at most {most}, the rank of the model's queries; got {spec.q_lora_rank}")
    return replace(spec, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=g.head_dim)


def rotating_pairs(rope: int, rotary_dim: int) -> list[int]:
    """Which of the model's frequencies the rope part keeps, evenly spread from the highest on."""
    have, want = rotary_dim // 2, rope // 2
    return [pair * have // want for pair in range(want)]


def factored(
    p: Projections, norms: tuple[nn.Module | None, nn.Module | None], spec: MLA, rotary_dim: int
) -> LatentWeights:
    """The latent layer's weights, in the dtype and on the device of `p`; computed in fp64 (not on a meta device).

    Args:
        p: weights of the layer that it takes the place of.
        norms: its per-head norms of queries and keys. A product cannot hold them: what they do to a head of the mean
            size goes into the weights.
        spec: with all sizes, see `filled`.
        rotary_dim: leading dimensions of each head that the model rotates, in halves; 0: none.
    """
    like, heads, head_dim = p.q, p.q.shape[0], p.q.shape[1]
    q, q_bias = _normed(p.q, p.q_bias, norms[0])
    k, k_bias = _normed(p.k, p.k_bias, norms[1])
    v = p.v.double()
    assert spec.qk_rope_head_dim and spec.kv_lora_rank and spec.qk_nope_head_dim
    if rotary_dim:
        pairs = rotating_pairs(spec.qk_rope_head_dim, rotary_dim)
        turning = pairs + [pair + rotary_dim // 2 for pair in pairs]
        still = [d for d in range(head_dim) if d not in turning]
        q_rope, k_rope = q[:, turning], k[:, turning].mean(0)
    else:  # nothing rotates: a rope key that no query asks for until it is trained
        turning, still = list(range(spec.qk_rope_head_dim)), list(range(head_dim))
        wrapped = [d % head_dim for d in turning]
        q_rope, k_rope = torch.zeros_like(q[:, wrapped]), k[:, wrapped].mean(0)
        q_bias = None if q_bias is None else torch.cat([q_bias, torch.zeros_like(q_bias[:, wrapped])], 1)
        turning = [head_dim + n for n in range(len(wrapped))]
    q_all = torch.cat([q[:, still], q_rope], dim=1)  # [H, nope + rope, dim]
    if q_bias is not None:
        q_bias = q_bias[:, still + turning]

    joint = torch.cat([k[:, still], v], dim=1)  # [Hk, nope + v, dim]
    down, up = _low_rank(joint.flatten(0, 1), spec.kv_lora_rank)
    # A key's own bias adds the same to all scores of a query, which softmax does not see: only the rope part's counts.
    kv_bias = None
    if k_bias is not None and rotary_dim:
        kv_bias = torch.cat([k.new_zeros(spec.kv_lora_rank), k_bias[:, turning].mean(0)])
    up = up.unflatten(0, joint.shape[:2]).repeat_interleave(heads // p.k.shape[0], dim=0)
    o_bias = None if p.o_bias is None else p.o_bias.double()
    if p.v_bias is not None:  # the same for all keys, so it goes through the sum as it is
        each = p.v_bias.double().repeat_interleave(heads // p.v.shape[0], dim=0)
        carried = torch.einsum("ohd,hd->o", p.o.double(), each)
        o_bias = carried if o_bias is None else o_bias + carried
    q_down, q_up = None, q_all.flatten(0, 1)
    if spec.q_lora_rank is not None:
        q_down, q_up = _low_rank(q_up, spec.q_lora_rank)
    parts = {
        "q": q_up,
        "q_bias": None if q_bias is None else q_bias.flatten(),
        "q_down": q_down,
        "kv_down": torch.cat([down, k_rope]),
        "kv_down_bias": kv_bias,
        "kv_up": up.flatten(0, 1),
        "o": p.o.flatten(1),
        "o_bias": o_bias,
    }
    return LatentWeights(**{name: None if t is None else t.to(like.dtype) for name, t in parts.items()})  # type: ignore[arg-type]


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down [rank, in]` and `up [out, rank]` whose product is the nearest to `weight [out, in]`."""
    if weight.is_meta:
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    # The latents of a unit input are as large as its keys and values.
    root = sizes[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _normed(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """A head's projection `[H, D, dim]` times what its norm does to an output of the mean size."""
    weight, bias = weight.double(), None if bias is None else bias.double()
    if norm is None:
        return weight, bias
    parameter = next(norm.parameters())
    gamma = norm(torch.ones_like(parameter)).detach().double()[:, None]  # [D, 1]
    size = weight.square().mean(dim=1, keepdim=True).sum(dim=2, keepdim=True).sqrt().clamp(min=1e-12)  # [H, 1, 1]
    return weight * gamma / size, None if bias is None else bias * gamma[:, 0] / size[:, :, 0]
