"""A few tokens of softmax near and linear attention far: window, state and what moves between them, in one pass.

A program has a row and key head to itself. The window's other keys stand in a ring, that of position p in slot
`p % SLOTS`; the slot of a new token holds the one that leaves the window, and enters the state, with it.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import apply_map
from attnzoo.ops.linear.triton.kernels_step import load_mapped, load_vector, multiply
from attnzoo.ops.linear.triton.tiles import head_base
from attnzoo.ops.linear.triton.weights import inverse_or_zero


@triton.jit
def weigh(weights, values, total):
    """total + weights values, where the weights are of fp32: two products of halves if the values are of fewer bits."""
    if values.dtype == tl.float32:
        total = tl.dot(weights, values, total, input_precision="ieee")
    else:
        high = weights.to(values.dtype)
        total = tl.dot(high, values, total)
        total = tl.dot((weights - high.to(tl.float32)).to(values.dtype), values, total)
    return total


@triton.jit
def load_slots(x, slots, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[slots, BLOCK] of a ring's head, 0 where not `seen` and from WIDTH on."""
    columns = tl.arange(0, BLOCK)
    mask = seen[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + slots[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def near_sums(
    queries, key, value, ring_k, ring_v, position, scale,
    SLOTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of the query's own key and the ring's: sums of e^(score - top) values [BG, BV], and of e^(score - top) [BG]."""
    top = tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale
    weight = top * 0.0 + 1.0
    total = weight[:, None] * value[None, :]
    for first in range(0, SLOTS, BN):
        slots = first + tl.arange(0, BN)
        age = (position - 1 - slots + SLOTS) % max(SLOTS, 1)  # tokens between that one and this
        seen = (slots < SLOTS) & (age < position)
        keys = load_slots(ring_k, slots, seen, D, BD)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(weights, 1)
        total = weigh(weights, load_slots(ring_v, slots, seen, DV, BV), total * shrink[:, None])
        top = higher
    return total, weight


@triton.jit
def hybrid_step(
    q, k, v, f_q, f_k, s, z, ring_k, ring_f, ring_v, out, before, lengths, gain,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, fq_b, fq_h, fq_s, fk_b, fk_h, fk_s, tokens, scale,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, MAP: tl.constexpr, OWN_KEYS: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, DV]. State and ring are of one piece each; the state's rows are looked at BF at a time."""
    head, row = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    member, columns = tl.arange(0, BG), tl.arange(0, BV)
    dims, features = tl.arange(0, BD), tl.arange(0, BF)
    block = row.to(tl.int64) * heads + head
    s += block * F * DV
    z += block * F
    ring_f += block * SLOTS * F
    ring_v += block * SLOTS * DV
    ring_k += block * SLOTS * D
    k, v = head_base(k, row, head, k_b, k_h), head_base(v, row, head, v_b, v_h)
    f_k = head_base(f_k, row, head, fk_b, fk_h)
    q, f_q = head_base(q, row, head * GROUP, q_b, q_h), head_base(f_q, row, head * GROUP, fq_b, fq_h)
    out += block * GROUP * tokens * DV
    share = tl.full([BG], 1.0, tl.float32)
    if gain is not None:
        share = tl.load(gain + head * GROUP + member, mask=member < GROUP, other=0.0).to(tl.float32)
    real = tokens
    if lengths is not None:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), tokens)
    start = tl.load(before + row).to(tl.int32)
    for token in range(0, tokens):
        alive = token < real
        position = start + token
        mine = (member < GROUP) & alive
        leaves = alive
        slot = 0
        if SLOTS > 0:
            leaves = alive & (position >= SLOTS)
            slot = position % SLOTS
        key = load_vector(k + token * k_s, D, alive, BD)
        value = load_vector(v + token * v_s, DV, alive, BV)
        gone_value = value
        if SLOTS > 0:
            gone_value = load_vector(ring_v + slot * DV, DV, leaves, BV)
        to = q + token * q_s + member[:, None] * q_h + dims[None, :]
        queries = tl.load(to, mask=mine[:, None] & (dims < D)[None, :], other=0.0)
        total, weight = near_sums(queries, key, value, ring_k, ring_v, position, scale, SLOTS, D, DV, BD, BV, BN)
        total, weight = total * share[:, None], weight * share
        for low in tl.static_range(0, F, BF):
            inside = low + features < F
            gone = load_mapped(f_k + token * fk_s + low, leaves, MAP, F - low, BF)
            if SLOTS > 0:
                gone = load_mapped(ring_f + slot * F + low, leaves, MAP, F - low, BF)
            to = f_q + token * fq_s + member[:, None] * fq_h + low + features[None, :]
            mask = mine[:, None] & inside[None, :]
            mapped = apply_map(tl.load(to, mask=mask, other=0.0).to(tl.float32), MAP)
            mapped = tl.where(mask, mapped, 0.0)
            sums = tl.load(z + low + features, mask=inside, other=0.0)
            mask = inside[:, None] & (columns < DV)[None, :]
            to = s + (low + features)[:, None] * DV + columns[None, :]
            state = tl.load(to, mask=mask, other=0.0)
            tl.store(to, state + gone[:, None] * gone_value[None, :], mask=mask)
            total = multiply(mapped, state, total, PIECES)
            weight += tl.sum(mapped * sums[None, :], 1)
            fresh = tl.load(f_k + token * fk_s + low + features, mask=inside & alive, other=0.0)
            tl.debug_barrier()  # these sums, and the ring, have been read by all
            tl.store(z + low + features, sums + gone, mask=inside & alive)
            if SLOTS > 0:
                tl.store(ring_f + slot * F + low + features, fresh, mask=inside & alive)
        total = tl.where(mine[:, None], total * inverse_or_zero(weight)[:, None], 0.0)
        to = out + (member[:, None] * tokens + token) * DV + columns[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(member < GROUP)[:, None] & (columns < DV)[None, :])
        if SLOTS > 0:
            tl.store(ring_v + slot * DV + columns, value.to(ring_v.dtype.element_ty), mask=(columns < DV) & alive)
            if OWN_KEYS:
                tl.store(ring_k + slot * D + dims, key.to(ring_k.dtype.element_ty), mask=(dims < D) & alive)
        tl.debug_barrier()  # the next token finds all of it
