"""Sums of the parts of a sequence: what keys add to its state, and queries to the gradient of that."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 (what is known when a kernel is compiled must be asked alone)

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import load_features
from attnzoo.ops.linear.triton.states import load_state, store_state
from attnzoo.ops.linear.triton.tiles import head_base, load_rate, load_tile, locate
from attnzoo.ops.linear.triton.weights import (
    NARROW,
    decay_since,
    decay_until,
    find_dots,
    load_inverse,
    narrow_rows,
    real_tokens,
    twice,
)


@triton.jit
def blank_keys(start, chunks, low, high, FADES: tl.constexpr, MAP: tl.constexpr, CHUNK: tl.constexpr):
    """What keys outside the rows [low, high) have added to every sum in z: each one, where map(0) is 1."""
    found = 0.0
    if MAP == "elu":
        if not FADES:
            real = tl.maximum(tl.minimum(start + chunks * CHUNK, high) - tl.maximum(start, low), 0)
            found = (chunks * CHUNK - real).to(tl.float32)
    return found


@triton.jit
def sum_parts(
    k,
    v,
    sums,
    z_sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    length,
    parts,
    part,
    lag,
    SKIP_LAST: tl.constexpr,
    FOLLOWED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [P, Hk, D, DV] and z_sums [P, Hk, D]: what the keys of each part, `lag` tokens late, add to the state.

    FOLLOWED: by a kernel that may begin now, as it waits where it reads them.
    """
    if FOLLOWED:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)
    head, v0 = tl.program_id(1), tl.program_id(2) * BV
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    if SKIP_LAST:
        if here.place == here.count - 1:
            return
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h) + v0
    rate = load_rate(log_decay, head)
    s = tl.zeros([BV, BD], tl.float32)
    z = tl.zeros([NARROW, BD], tl.float32)
    ones = twice(tl.full([CHUNK], 1.0, COMPUTE)).to(COMPUTE)
    stop = tl.maximum(tl.minimum(here.start + part, end + lag), here.start)
    for first in range(here.start, stop, CHUNK):
        keys = load_features(k, k_s, first - lag, begin, end, D, CHUNK, BD, BD == D, FULL, MAP, COMPUTE)
        values = load_tile(v, v_s, first - lag, begin, end, DV - v0, CHUNK, BV, DV % BV == 0, FULL).to(COMPUTE)
        if log_decay is not None:
            real = real_tokens(first, end, CHUNK)
            fade = tl.exp(rate * real.to(tl.float32))
            keys = (keys * decay_until(rate, real, CHUNK)[:, None]).to(COMPUTE)
            s, z = s * fade, z * fade
        s = tl.dot(tl.trans(values), keys, s, input_precision=PRECISION)
        if NORMALIZE:
            z = tl.dot(ones, keys, z, input_precision=PRECISION)
    chunks = tl.cdiv(stop - here.start, CHUNK)
    blank = blank_keys(here.start - lag, chunks, begin, end, log_decay is not None, MAP, CHUNK)
    index = tl.program_id(0) * tl.num_programs(1) + head
    store_state(sums, z_sums, index, v0, 0, s, tl.sum(z, 0) / 2 - blank, NORMALIZE, D, DV, BV, BD)


@triton.jit
def join_parts(
    sums,
    z_sums,
    s0,
    z0,
    s1,
    z1,
    firsts,
    parts,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """s1 [N, Hk, D, DV] and z1 [N, Hk, D]: the state before, and the sums of a sequence's parts in their order."""
    n, head, v0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    kv_heads = tl.num_programs(1)
    first = n * parts
    last = first + parts
    if firsts is not None:
        first = tl.load(firsts + n).to(tl.int32)
        last = tl.load(firsts + n + 1).to(tl.int32)
    s = tl.zeros([BV, BD], tl.float32)
    z = tl.zeros([BD], tl.float32)
    if s0 is not None:
        s, z = load_state(s0, z0, n * kv_heads + head, v0, 0, NORMALIZE, D, DV, BV, BD)
    for p in range(first, last):
        more, z_more = load_state(sums, z_sums, p * kv_heads + head, v0, 0, NORMALIZE, D, DV, BV, BD)
        s += more
        z += z_more
    store_state(s1, z1, n * kv_heads + head, v0, 0, s, z, NORMALIZE, D, DV, BV, BD)


@triton.jit
def sum_gradient_parts(
    q,
    d_out,
    out,
    inverses,
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
    FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [P, Hk, D, DV] and z_sums [P, Hk, D]: what the queries of each part, those `lag` tokens on, add to the
    state's gradient; with the normaliser also dots [B, Hq, length]."""
    head, d0 = tl.program_id(1), tl.program_id(2) * BD
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    rate = load_rate(log_decay, head)
    s = tl.zeros([BV, BD], tl.float32)
    z = tl.zeros([NARROW, BD], tl.float32)
    chunks = tl.cdiv(tl.maximum(tl.minimum(here.start + part, end) - here.start, 0), CHUNK)
    heads = tl.num_programs(1) * GROUP
    for step in range(0, chunks * GROUP):
        first = here.start + (chunks - 1 - step // GROUP) * CHUNK
        q_head = head * GROUP + step % GROUP
        at = (row.to(tl.int64) * heads + q_head) * length
        late = first + lag
        own = head_base(q, row, q_head, q_b, q_h) + d0
        queries = load_features(own, q_s, late, begin, end, D - d0, CHUNK, BD, D % BD == 0, FULL, MAP, COMPUTE)
        given = head_base(d_out, row, q_head, do_b, do_h)
        upstream = load_tile(given, do_s, late, begin, end, DV, CHUNK, BV, BV == DV, FULL).to(COMPUTE)
        factor = load_inverse(inverses + at, late, begin, end, scale, NORMALIZE, CHUNK, FULL)
        if log_decay is not None:
            factor = factor * decay_since(rate, CHUNK)
            if step % GROUP == 0:
                fade = tl.exp(rate * real_tokens(first, end, CHUNK).to(tl.float32))
                s, z = s * fade, z * fade
        queries = (queries * factor[:, None]).to(COMPUTE)
        s = tl.dot(tl.trans(upstream), queries, s, input_precision=PRECISION)
        if NORMALIZE:
            o = head_base(out, row, q_head, o_b, o_h)
            found = find_dots(
                upstream, o, o_s, dots + at, late, begin, end, DV, d0 == 0, BV, BV == DV, CHUNK, FULL, PRECISION
            )
            z = tl.dot(narrow_rows(found, COMPUTE), queries, z, input_precision=PRECISION)
    index = tl.program_id(0) * tl.num_programs(1) + head
    store_state(sums, z_sums, index, 0, d0, s, -tl.sum(z, 0), NORMALIZE, D, DV, BV, BD)
