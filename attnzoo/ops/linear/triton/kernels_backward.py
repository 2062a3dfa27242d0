"""Linear attention backward: queries' gradients walking forward, keys' and values' walking back.

With out_i = r_i / t_i the weight of key j has the gradient (do_i . v_j - do_i . out_i) / t_i, where the second product
falls away without the normaliser t, whose place the scale takes. `dots` holds do_i . out_i. Programs hold a block of
what they write: of the features' columns for queries and keys, of the values' for values. States are transposed, as in
the forward.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 (what is known when a kernel is compiled must be asked alone)

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.kernels_forward import state_before
from attnzoo.ops.linear.triton.tiles import (
    decay_since,
    decay_until,
    head_base,
    inverse_or_zero,
    load_features,
    load_state,
    load_tile,
    locate,
    mask_weights,
    part_fade,
    real_tokens,
    row_mask,
    store_state,
    store_tile,
    times_slope,
)


@triton.jit
def load_inverse(total, first, low, high, scale, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr):
    """1 / t, or the scale; 0 outside the rows [low, high)."""
    real = row_mask(first, low, high, CHUNK)
    if NORMALIZE:
        return inverse_or_zero(tl.load(total + first + tl.arange(0, CHUNK), mask=real, other=0.0))
    return tl.where(real, scale, 0.0)


@triton.jit
def load_dots(
    upstream,
    out,
    o_s,
    dots,
    first,
    low,
    high,
    width,
    write,
    BV: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """do . out, [CHUNK]: read, or if there is an `out` found from the tile of do and it, and written if `write`."""
    real = row_mask(first, low, high, CHUNK)
    at = dots + first + tl.arange(0, CHUNK)
    if out is not None:
        o = load_tile(out, o_s, first, low, high, width, CHUNK, BV, EVEN)
        found = tl.sum(upstream.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(at, found, mask=real & write)
    else:
        found = tl.load(at, mask=real, other=0.0)
    return found


@triton.jit
def sum_gradient_parts(
    q,
    d_out,
    out,
    total,
    dots,
    sums,
    z_sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    do_b,
    do_h,
    do_s,
    o_b,
    o_h,
    o_s,
    length,
    parts,
    part,
    lag,
    scale,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [P, Hk, D, DV] and z_sums [P, Hk, D]: what the queries of each part, those `lag` tokens on, add to the
    state's gradient; with the normaliser also dots [B, Hq, length]."""
    head, d0 = tl.program_id(1), tl.program_id(2) * BD
    _n, row, begin, end, _stop, place, _count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    s = tl.zeros([BV, BD], tl.float32)
    z = tl.zeros([BD], tl.float32)
    start = begin + place * part
    chunks = tl.cdiv(tl.maximum(tl.minimum(start + part, end) - start, 0), CHUNK)
    heads = tl.num_programs(1) * GROUP
    for step in range(0, chunks * GROUP):
        first = start + (chunks - 1 - step // GROUP) * CHUNK
        q_head = head * GROUP + step % GROUP
        at = (row.to(tl.int64) * heads + q_head) * length
        late = first + lag
        own = head_base(q, row, q_head, q_b, q_h) + d0
        queries = load_features(own, q_s, late, begin, end, D - d0, CHUNK, BD, D % BD == 0, MAP)
        given = head_base(d_out, row, q_head, do_b, do_h)
        upstream = load_tile(given, do_s, late, begin, end, DV, CHUNK, BV, BV == DV).to(COMPUTE)
        factor = load_inverse(total + at, late, begin, end, scale, NORMALIZE, CHUNK)
        if log_decay is not None:
            factor = factor * decay_since(rate, CHUNK)
            if step % GROUP == 0:
                fade = tl.exp(rate * real_tokens(first, end, CHUNK).to(tl.float32))
                s, z = s * fade, z * fade
        queries = queries * factor[:, None]
        s = tl.dot(tl.trans(upstream), queries.to(COMPUTE), s, input_precision=PRECISION)
        if NORMALIZE:
            o = head_base(out, row, q_head, o_b, o_h)
            found = load_dots(upstream, o, o_s, dots + at, late, begin, end, DV, d0 == 0, BV, BV == DV, CHUNK)
            z -= tl.sum(queries * found[:, None], 0)
    index = tl.program_id(0) * tl.num_programs(1) + head
    store_state(sums, z_sums, index, 0, d0, s, z, NORMALIZE, D, DV, BV, BD)


@triton.jit
def grad_queries(
    q,
    k,
    v,
    d_out,
    out,
    total,
    dots,
    d_q,
    s0,
    z0,
    sums,
    z_sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    do_b,
    do_h,
    do_s,
    o_b,
    o_h,
    o_s,
    dq_b,
    dq_h,
    dq_s,
    length,
    parts,
    part,
    scale,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q, and if there is an `out` also dots [B, Hq, length]. Without causality all queries read the state s0."""
    q_head, d0 = tl.program_id(1), tl.program_id(2) * BD
    head = q_head // GROUP
    kv_heads = tl.num_programs(1) // GROUP
    n, row, begin, end, stop, place, _count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    q = head_base(q, row, q_head, q_b, q_h) + d0
    k = head_base(k, row, head, k_b, k_h) + d0
    v = head_base(v, row, head, v_b, v_h)
    d_out = head_base(d_out, row, q_head, do_b, do_h)
    if out is not None:
        out = head_base(out, row, q_head, o_b, o_h)
    d_q = head_base(d_q, row, q_head, dq_b, dq_h) + d0
    total, dots = total + at, dots + at
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    s, z = state_before(
        s0, z0, sums, z_sums, n, place, head, kv_heads, begin, end, part, rate, 0, d0, NORMALIZE, D, DV, BV, BD
    )
    start = begin + place * part
    for first in range(start, tl.minimum(start + part, stop), CHUNK):
        upstream = load_tile(d_out, do_s, first, begin, end, DV, CHUNK, BV, BV == DV).to(COMPUTE)
        inverse = load_inverse(total, first, begin, end, scale, NORMALIZE, CHUNK)
        d_features = tl.dot(upstream, s.to(COMPUTE), input_precision=PRECISION)
        if NORMALIZE:
            found = load_dots(upstream, out, o_s, dots, first, begin, end, DV, d0 == 0, BV, BV == DV, CHUNK)
            d_features -= found[:, None] * z[None, :]
        if log_decay is not None:
            d_features = d_features * decay_since(rate, CHUNK)[:, None]
        if CAUSAL:
            keys = load_features(k, k_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, MAP)
            values = load_tile(v, v_s, first, begin, end, DV, CHUNK, BV, BV == DV).to(COMPUTE)
            d_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
            if NORMALIZE:
                d_weights -= found[:, None]
            d_weights = mask_weights(d_weights, rate, False, CHUNK)
            d_features = tl.dot(d_weights.to(COMPUTE), keys.to(COMPUTE), d_features, input_precision=PRECISION)
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                fade = tl.exp(rate * real.to(tl.float32))
                keys = keys * decay_until(rate, real, CHUNK)[:, None]
                s, z = s * fade, z * fade
            s = tl.dot(tl.trans(values), keys.to(COMPUTE), s, input_precision=PRECISION)
            if NORMALIZE:
                z += tl.sum(keys, 0)
        d_features = d_features * inverse[:, None]
        if MAP != "identity":
            queries = load_features(q, q_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, MAP)
            d_features = times_slope(d_features, queries, MAP)
        store_tile(d_q, dq_s, first, begin, stop, D - d0, d_features, CHUNK, BD, D % BD == 0)


@triton.jit
def gradient_after(
    d_s1,
    d_z1,
    sums,
    z_sums,
    n,
    place,
    count,
    head,
    kv_heads,
    begin,
    end,
    part,
    rate,
    v0,
    d0,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """The gradient of the state after this program's part: the last state's, and the sums of the parts after."""
    s = tl.zeros([RV, RD], tl.float32)
    z = tl.zeros([RD], tl.float32)
    if d_s1 is not None:
        s, z = load_state(d_s1, d_z1, n * kv_heads + head, v0, d0, NORMALIZE, D, DV, RV, RD)
    if sums is not None:
        for back in range(0, count - 1 - place):
            later = count - 1 - back
            if rate is not None:
                fade = part_fade(rate, begin, end, later, part)
                s, z = s * fade, z * fade
            index = (tl.program_id(0) - place + later) * kv_heads + head
            more, z_more = load_state(sums, z_sums, index, v0, d0, NORMALIZE, D, DV, RV, RD)
            s += more
            z += z_more
    return s, z


@triton.jit
def grad_keys(
    q,
    k,
    v,
    d_out,
    total,
    dots,
    d_k,
    d_s1,
    d_z1,
    sums,
    z_sums,
    d_s0,
    d_z0,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    do_b,
    do_h,
    do_s,
    dk_b,
    dk_h,
    dk_s,
    length,
    parts,
    part,
    scale,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k, and if there is a d_s0 also d_z0. Without causality the gradient d_s1 of the state is all that keys need."""
    head, d0 = tl.program_id(1), tl.program_id(2) * BD
    n, row, begin, end, stop, place, count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    kv_heads = tl.num_programs(1)
    k = head_base(k, row, head, k_b, k_h) + d0
    v = head_base(v, row, head, v_b, v_h)
    d_k = head_base(d_k, row, head, dk_b, dk_h) + d0
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    s, z = gradient_after(
        d_s1,
        d_z1,
        sums,
        z_sums,
        n,
        place,
        count,
        head,
        kv_heads,
        begin,
        end,
        part,
        rate,
        0,
        d0,
        NORMALIZE,
        D,
        DV,
        BV,
        BD,
    )
    start = begin + place * part
    chunks = tl.cdiv(tl.maximum(tl.minimum(start + part, stop) - start, 0), CHUNK)
    d_features = tl.zeros([CHUNK, BD], tl.float32)
    for step in range(0, chunks * GROUP):
        first = start + (chunks - 1 - step // GROUP) * CHUNK
        values = load_tile(v, v_s, first, begin, end, DV, CHUNK, BV, BV == DV).to(COMPUTE)
        if step % GROUP == 0:  # the chunk's keys meet the queries after it
            d_features = tl.dot(values, s.to(COMPUTE), input_precision=PRECISION)
            if NORMALIZE:
                d_features += z[None, :]
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                d_features = d_features * decay_until(rate, real, CHUNK)[:, None]
                fade = tl.exp(rate * real.to(tl.float32))
                s, z = s * fade, z * fade
        if CAUSAL:
            q_head = head * GROUP + step % GROUP
            at = (row.to(tl.int64) * (kv_heads * GROUP) + q_head) * length
            own = head_base(q, row, q_head, q_b, q_h) + d0
            queries = load_features(own, q_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, MAP)
            given = head_base(d_out, row, q_head, do_b, do_h)
            upstream = load_tile(given, do_s, first, begin, end, DV, CHUNK, BV, BV == DV).to(COMPUTE)
            inverse = load_inverse(total + at, first, begin, end, scale, NORMALIZE, CHUNK)
            queries = queries * inverse[:, None]
            d_weights = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)  # [keys, queries]
            if NORMALIZE:
                found = load_dots(upstream, None, 0, dots + at, first, begin, end, DV, False, BV, BV == DV, CHUNK)
                d_weights -= found[None, :]
            d_weights = mask_weights(d_weights, rate, True, CHUNK)
            d_features = tl.dot(d_weights.to(COMPUTE), queries.to(COMPUTE), d_features, input_precision=PRECISION)
            if log_decay is not None:
                queries = queries * decay_since(rate, CHUNK)[:, None]
            s = tl.dot(tl.trans(upstream), queries.to(COMPUTE), s, input_precision=PRECISION)
            if NORMALIZE:
                z -= tl.sum(queries * found[:, None], 0)
        if step % GROUP == GROUP - 1:
            # Nothing passes to keys in padding, whatever the state's gradient is.
            result = tl.where(row_mask(first, begin, end, CHUNK)[:, None], d_features, 0.0)
            if MAP != "identity":
                keys = load_features(k, k_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, MAP)
                result = times_slope(result, keys, MAP)
            store_tile(d_k, dk_s, first, begin, stop, D - d0, result, CHUNK, BD, D % BD == 0)
    if d_s0 is not None:
        if place == 0:
            store_state(d_s0, d_z0, n * kv_heads + head, 0, d0, s, z, NORMALIZE, D, DV, BV, BD)


@triton.jit
def grad_values(
    q,
    k,
    d_out,
    total,
    d_v,
    d_s1,
    sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    do_b,
    do_h,
    do_s,
    dv_b,
    dv_h,
    dv_s,
    length,
    parts,
    part,
    scale,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_v. Without causality the gradient d_s1 of the state is all that values need."""
    head, v0 = tl.program_id(1), tl.program_id(2) * BV
    n, row, begin, end, stop, place, count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    kv_heads = tl.num_programs(1)
    k = head_base(k, row, head, k_b, k_h)
    d_v = head_base(d_v, row, head, dv_b, dv_h) + v0
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    s, _z = gradient_after(
        d_s1, None, sums, None, n, place, count, head, kv_heads, begin, end, part, rate, v0, 0, False, D, DV, BV, BD
    )
    start = begin + place * part
    chunks = tl.cdiv(tl.maximum(tl.minimum(start + part, stop) - start, 0), CHUNK)
    d_values = tl.zeros([CHUNK, BV], tl.float32)
    for step in range(0, chunks * GROUP):
        first = start + (chunks - 1 - step // GROUP) * CHUNK
        keys = load_features(k, k_s, first, begin, end, D, CHUNK, BD, BD == D, MAP).to(COMPUTE)
        if step % GROUP == 0:
            d_values = tl.dot(keys, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                d_values = d_values * decay_until(rate, real, CHUNK)[:, None]
                s = s * tl.exp(rate * real.to(tl.float32))
        if CAUSAL:
            q_head = head * GROUP + step % GROUP
            at = (row.to(tl.int64) * (kv_heads * GROUP) + q_head) * length
            own = head_base(q, row, q_head, q_b, q_h)
            queries = load_features(own, q_s, first, begin, end, D, CHUNK, BD, BD == D, MAP)
            given = head_base(d_out, row, q_head, do_b, do_h) + v0
            upstream = load_tile(given, do_s, first, begin, end, DV - v0, CHUNK, BV, DV % BV == 0).to(COMPUTE)
            inverse = load_inverse(total + at, first, begin, end, scale, NORMALIZE, CHUNK)
            queries = queries * inverse[:, None]
            weights = tl.dot(keys, tl.trans(queries.to(COMPUTE)), input_precision=PRECISION)  # [keys, queries]
            weights = mask_weights(weights, rate, True, CHUNK)
            d_values = tl.dot(weights.to(COMPUTE), upstream, d_values, input_precision=PRECISION)
            if log_decay is not None:
                queries = queries * decay_since(rate, CHUNK)[:, None]
            s = tl.dot(tl.trans(upstream), queries.to(COMPUTE), s, input_precision=PRECISION)
        if step % GROUP == GROUP - 1:
            result = tl.where(row_mask(first, begin, end, CHUNK)[:, None], d_values, 0.0)
            store_tile(d_v, dv_s, first, begin, stop, DV - v0, result, CHUNK, BV, DV % BV == 0)
