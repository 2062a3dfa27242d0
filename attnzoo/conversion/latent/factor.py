"""Latent attention's weights out of a layer's: rope keys, and one latent for all that does not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.latent.concentrate import Planes, planes_of
from attnzoo.conversion.latent.costs import Inputs, key_costs, value_costs, widened


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

    def named(self) -> dict[str, Tensor]:
        """By their names in the module, contiguous; those that are None are left out."""
        tensors = {name: getattr(self, part) for part, name in self._names(self.q_down is not None).items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> LatentWeights:
        """The inverse of `named`."""
        names = cls._names("q_a_proj.weight" in named)
        return cls(**{part: named.get(name) for part, name in names.items()})  # type: ignore[arg-type]

    @staticmethod
    def _names(low_rank_queries: bool) -> dict[str, str]:
        queries = "q_b_proj" if low_rank_queries else "q_proj"
        return {
            "q": f"{queries}.weight",
            "q_bias": f"{queries}.bias",
            "q_down": "q_a_proj.weight",
            "kv_down": "kv_a_proj_with_mqa.weight",
            "kv_down_bias": "kv_a_proj_with_mqa.bias",
            "kv_up": "kv_b_proj.weight",
            "o": "o_proj.weight",
            "o_bias": "o_proj.bias",
        }


@dataclass(frozen=True)
class RopePart:
    """What rotates, before and after.

    rotary_dim: leading dimensions of a head that the model rotates, in halves; 0: none.
    planes: the frequency of each rope plane, rising; one that is there twice has two planes.
    blind: `[rotary_dim / 2]` complex, what stands for the rotation where it is dropped; see `distance_blind`.
    """

    rotary_dim: int
    planes: tuple[int, ...]
    blind: Tensor


def latent_weights(
    p: Projections, inputs: Inputs, rope: RopePart, *, rank: int, nope: int, scale: float, q_rank: int | None = None
) -> LatentWeights:
    """One layer's weights of latent attention (arXiv 2405.04434), in fp64 on the device of `p`.

    Rope keys are the planes of the most worth (see `planes_of`). What is left of the keys is no longer rotated; it and
    the values are factored together, so that what is lost costs the least at the output: the principal components of
    both, weighted by `key_costs` and `value_costs` and by the inputs' moment (after TransMLA, arXiv 2502.07864, and
    CARE, 2603.17946). With planes for every head and frequency, or without RoPE, and at full rank, it is exact.

    Args:
        p: the layer's weights, without per-head norms.
        inputs: its inputs' moments, damped.
        rope: what rotates.
        rank: size of the latent, at least 1.
        nope: size of the part of a head's queries and keys that does not rotate. What the model does not rotate itself
            comes first in it, then the planes with the most left.
        scale: of the scores.
        q_rank: size of the queries' latent; None: none.
    """
    heads, head_dim, _ = p.q.shape
    kv_heads, group = p.k.shape[0], heads // p.k.shape[0]
    q = widened(p.q, p.q_bias)
    planes = planes_of(p, inputs, rope.rotary_dim, scale)
    q_rope, k_rope, left = _rope_part(q, planes, rope, group)

    k_rest = widened(p.k, None)
    k_rest[:, : rope.rotary_dim] = left
    kept = _kept(left, planes, rope, head_dim, nope)
    root, v_root = _root(key_costs(p, inputs, scale)[:, kept][:, :, kept]), _root(value_costs(p))
    stacked = torch.cat([root @ k_rest[:, kept], v_root @ widened(p.v, None)], dim=1)  # [Hk, kept + D, dim + 1]
    down, up = _principal(stacked.flatten(0, 1), inputs.attended, rank)
    up = up.unflatten(0, stacked.shape[:2])
    k_up = up.new_zeros(kv_heads, nope, rank)
    k_up[:, : len(kept)] = torch.linalg.solve(root, up[:, : len(kept)])
    v_up = torch.linalg.solve(v_root, up[:, len(kept) :])
    q_nope = q.new_zeros(heads, nope, q.shape[-1])
    q_nope[:, : len(kept)] = q[:, kept]

    q_all = torch.cat([q_nope, q_rope], dim=1).flatten(0, 1)
    q_down, q_up = (None, q_all[:, :-1]) if q_rank is None else _low_rank(q_all[:, :-1], inputs.asking, q_rank)
    # A bias of keys that do not rotate adds the same to all scores of a query, which softmax does not see.
    down_bias = None if p.k_bias is None else torch.cat([k_rope.new_zeros(rank), k_rope[:, -1]])
    return LatentWeights(
        q=q_up,
        q_bias=None if p.q_bias is None else q_all[:, -1],
        q_down=q_down,
        kv_down=torch.cat([down[:, :-1], k_rope[:, :-1]]),
        kv_down_bias=down_bias,
        kv_up=torch.cat([k_up, v_up], dim=1).repeat_interleave(group, dim=0).flatten(0, 1),
        o=p.o.double().flatten(1),
        o_bias=_output_bias(p),
    )


def _rope_part(q: Tensor, planes: Planes, rope: RopePart, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rope queries `[H, rope, dim + 1]`, rope keys `[rope, dim + 1]`, and what is left of all heads' rotating keys.

    Plane j of frequency f is asked for by head h with conj(m_hj) q_h. What is left is without bias: `[Hk, R, dim + 1]`.
    """
    half = rope.rotary_dim // 2
    counts = [0] * half
    at = []
    for f in rope.planes:
        at.append((f, counts[f]))
        counts[f] += 1
    f_of, j_of = [f for f, _ in at], [j for _, j in at]
    queries = torch.complex(q[:, :half], q[:, half : rope.rotary_dim])[:, f_of]  # [H, planes, dim + 1]
    mixing = planes.mixing[f_of, :, j_of].T.repeat_interleave(group, dim=0)  # [H, planes]
    dropped = torch.arange(planes.worth.shape[1], device=q.device) >= torch.tensor(counts, device=q.device)[:, None]
    blind = rope.blind.to(q.device)[:, None]
    left = torch.einsum("fhj,fjd->hfd", planes.mixing * dropped[:, None, :], planes.rows) * blind
    left[..., -1] = 0
    return _real(mixing.conj()[:, :, None] * queries), _real(planes.rows[f_of, j_of]), _real(left)


def _kept(left: Tensor, planes: Planes, rope: RopePart, head_dim: int, nope: int) -> list[int]:
    """At most `nope` dimensions of a head for the part that does not rotate."""
    half = rope.rotary_dim // 2
    still = list(range(rope.rotary_dim, head_dim))
    counts = torch.bincount(torch.tensor(rope.planes, dtype=torch.long), minlength=half)
    number = torch.arange(planes.worth.shape[1])
    lost = (planes.worth.cpu() * (number >= counts[:, None])).sum(1) * rope.blind.abs().square().cpu()
    most = min((nope - len(still)) // 2, int((counts < len(number)).sum()))
    best = sorted(lost.argsort(descending=True, stable=True)[:most].tolist())
    return [*best, *(f + half for f in best), *still]


def _output_bias(p: Projections) -> Tensor | None:
    """A bias of values is the same for all keys, so it goes through attention as it is."""
    if p.v_bias is None:
        return None if p.o_bias is None else p.o_bias.double()
    each = p.v_bias.double().repeat_interleave(p.q.shape[0] // p.v.shape[0], dim=0)
    carried = torch.einsum("ohd,hd->o", p.o.double(), each)
    return carried if p.o_bias is None else carried + p.o_bias.double()


def _real(z: Tensor) -> Tensor:
    """Complex planes `[..., planes, dim]` as twice as many real dimensions, in halves."""
    return torch.cat([z.real, z.imag], dim=-2)


def _root(costs: Tensor) -> Tensor:
    """Symmetric roots of costs `[..., n, n]`, lifted from zero so that they can be undone."""
    values, vectors = torch.linalg.eigh(costs)
    floor = 1e-9 * values.amax(dim=(-2, -1), keepdim=True) if values.numel() else values
    return vectors * values.clamp(min=floor).clamp(min=1e-30).sqrt()[..., None, :] @ vectors.mT


def _principal(rows: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down [rank, in]` and `up [out, rank]`: no product of that rank is nearer to `rows [out, in]` for such inputs."""
    values, vectors = torch.linalg.eigh(rows @ moment @ rows.mT)
    best = vectors[:, -rank:].flip(-1)
    down = best.new_zeros(rank, rows.shape[1])
    up = best.new_zeros(rows.shape[0], rank)
    # A latent's size is free: its root lies on either side.
    size = values[-rank:].flip(-1).clamp(min=1e-20 * float(values[-1].clamp(min=1e-30))) ** 0.25
    down[: best.shape[1]] = best.mT @ rows / size[:, None]
    up[:, : best.shape[1]] = best * size
    return down, up


def _low_rank(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for a weight `[out, dim]` and a moment with a 1."""
    return _principal(weight, moment[:-1, :-1], rank)
