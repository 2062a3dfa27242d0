"""A swapped latent layer's sizes, and its weights out of the layer that it takes the place of, without calibration.

The mathematics are `attnzoo.conversion.latent`'s; `attnzoo.convert` uses them with a calibration text. Exact without
RoPE and per-head norms at full rank, and with planes for every head and frequency; otherwise an approximation, to be
trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from attnzoo.conversion.families import Geometry, Projections
from attnzoo.conversion.latent import Inputs, LatentWeights, RopePart, distance_blind, latent_weights
from attnzoo.conversion.latent.method import without_norms
from attnzoo.specs import MLA

_FAR = 8192  # tokens; what is farther hardly counts


def filled(spec: MLA, geometry: Geometry, rotary_dim: int) -> MLA:
    """The spec with its open sizes chosen: half of all numbers are cached, all frequencies once if they fit in them.

    Raises:
        ValueError: for sizes that the layer's weights cannot be carried over to.
    """
    g = geometry
    rope = spec.qk_rope_head_dim
    if rope is None:
        rope = max(2, min(rotary_dim, g.num_kv_heads * g.head_dim // 2) // 2 * 2)
    most = g.num_kv_heads * rotary_dim
    if rotary_dim and rope > most:
        raise ValueError(
            f"qk_rope_head_dim must be at most {most}, the rotating dimensions of all KV heads; got {rope}"
        )
    frequencies = tuple(spec.rope_frequencies or fastest_frequencies(rope, rotary_dim))
    _check_frequencies(frequencies, rope, rotary_dim // 2, g.num_kv_heads)
    still = g.head_dim - rotary_dim
    nope = g.head_dim if spec.qk_nope_head_dim is None else spec.qk_nope_head_dim
    if nope < still:
        raise ValueError(
            f"qk_nope_head_dim must be at least {still}, what the model itself does not rotate of a head; got {nope}"
        )
    if spec.v_head_dim not in (None, g.head_dim):
        raise ValueError(f"v_head_dim must be {g.head_dim} (or None), as in the model; got {spec.v_head_dim}")
    most = min(g.dim, 2 * g.num_kv_heads * g.head_dim)
    rank = spec.kv_lora_rank or max(1, min(most, g.num_kv_heads * g.head_dim - (rope if rotary_dim else 0)))
    if rank > most:
        raise ValueError(f"kv_lora_rank must be at most {most}, the rank of the model's keys and values; got {rank}")
    most = min(g.dim, g.num_heads * (nope + rope))
    if spec.q_lora_rank is not None and spec.q_lora_rank > most:
        raise ValueError(f"q_lora_rank must be at most {most}, the rank of the model's queries; got {spec.q_lora_rank}")
    return replace(
        spec,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=g.head_dim,
        rope_frequencies=frequencies,
    )


def _check_frequencies(frequencies: tuple[int, ...], rope: int, have: int, each: int) -> None:
    counts = Counter(frequencies)
    fits = not frequencies or (max(counts) < have and max(counts.values()) <= each)
    if list(frequencies) != sorted(frequencies) or len(frequencies) != (rope // 2 if have else 0) or not fits:
        raise ValueError(
            f"rope_frequencies must be {rope // 2 if have else 0} rising indices of the model's {have} frequencies, "
            f"each at most {each} times; got {list(frequencies)}"
        )


def fastest_frequencies(rope: int, rotary_dim: int) -> tuple[int, ...]:
    """Which of the model's frequencies the rope part keeps without calibration: the fastest, which lose most.

    A rope part with room for more has all of them once, twice and so on, and then the fastest once more.
    """
    have, want = rotary_dim // 2, rope // 2 if rotary_dim else 0
    return tuple(sorted(plane % have for plane in range(want)))


def rope_of(model: nn.Module, planes: Sequence[int], reach: int | None = None) -> RopePart:
    """What rotates in a transformers model's latent attention.

    Args:
        model: has its tables of frequencies, or none.
        planes: the frequency of each rope plane.
        reach: the longest text that what stands for a dropped rotation is meant for; None: the model's longest.
    """
    tables = [table for name, table in model.named_buffers() if name.endswith("inv_freq")]
    if not tables:
        return RopePart(0, (), torch.ones(0, dtype=torch.complex128))
    if reach is None:
        reach = int(getattr(model.config, "max_position_embeddings", None) or _FAR)
    factor = next((m.attention_scaling for m in model.modules() if hasattr(m, "attention_scaling")), 1.0)
    blind = float(factor) ** 2 * distance_blind(tables[0], min(reach, _FAR))  # type: ignore[arg-type]
    return RopePart(2 * len(tables[0]), tuple(planes), blind)


def factored(p: Projections, spec: MLA, rope: RopePart, scale: float) -> LatentWeights:
    """The latent layer's weights, in the dtype and on the device of `p`; computed in fp64 (not on a meta device).

    Args:
        p: weights of the layer that it takes the place of; its norms' weights are what the norms multiply with.
        spec: with all sizes, see `filled`.
        rope: what rotates.
        scale: of the scores.
    """
    assert spec.kv_lora_rank and spec.qk_nope_head_dim and spec.qk_rope_head_dim
    sizes = {"rank": spec.kv_lora_rank, "nope": spec.qk_nope_head_dim, "q_rank": spec.q_lora_rank}
    if p.q.is_meta:
        return _shapes(p, spec)
    inputs = Inputs.unknown(p.q.shape[-1], p.q.device)
    w = latent_weights(without_norms(p, inputs.asking), inputs, rope, scale=scale, **sizes)  # type: ignore[arg-type]
    if not rope.rotary_dim:
        w = _with_idle_rope(w, p, spec)
    return LatentWeights.of({name: tensor.to(p.q.dtype) for name, tensor in w.named().items()})


def _with_idle_rope(w: LatentWeights, p: Projections, spec: MLA) -> LatentWeights:
    """Nothing rotates: a rope key that no query asks for until it is trained."""
    rope = spec.qk_rope_head_dim
    assert rope
    heads, dim = p.q.shape[0], w.kv_down.shape[1]
    keys = p.k.to(w.kv_down).mean(0)[torch.arange(rope, device=p.k.device) % p.k.shape[1]]
    wide = w.q.unflatten(0, (heads, -1))
    new = {"q": torch.cat([wide, wide.new_zeros(heads, rope, wide.shape[-1])], dim=1).flatten(0, 1)}
    new["kv_down"] = torch.cat([w.kv_down, keys.view(rope, dim)])
    if w.q_bias is not None:
        bias = w.q_bias.unflatten(0, (heads, -1))
        new["q_bias"] = torch.cat([bias, bias.new_zeros(heads, rope)], dim=1).flatten()
    if w.kv_down_bias is not None:
        new["kv_down_bias"] = torch.cat([w.kv_down_bias, w.kv_down_bias.new_zeros(rope)])
    return replace(w, **new)


def _shapes(p: Projections, spec: MLA) -> LatentWeights:
    """Weights without numbers, on a meta device."""
    heads, head_dim, dim = p.q.shape
    rank, nope, rope = spec.kv_lora_rank, spec.qk_nope_head_dim, spec.qk_rope_head_dim
    assert rank and nope and rope
    queries = heads * (nope + rope)
    biased = p.v_bias is not None or p.o_bias is not None
    return LatentWeights(
        q=p.q.new_empty(queries, spec.q_lora_rank or dim),
        q_bias=None if p.q_bias is None else p.q.new_empty(queries),
        q_down=None if spec.q_lora_rank is None else p.q.new_empty(spec.q_lora_rank, dim),
        kv_down=p.q.new_empty(rank + rope, dim),
        kv_down_bias=None if p.k_bias is None else p.q.new_empty(rank + rope),
        kv_up=p.q.new_empty(heads * (nope + head_dim), rank),
        o=p.q.new_empty(dim, heads * head_dim),
        o_bias=p.q.new_empty(dim) if biased else None,
    )
