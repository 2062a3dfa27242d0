"""A few new tokens over a state that is updated in place: read once, written once."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.tiles import apply_map, inverse_or_zero


@triton.jit
def step_state(
    q,
    k,
    v,
    s,
    z,
    out,
    log_decay,
    lengths,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    s_b,
    s_h,
    s_d,
    z_b,
    z_h,
    tokens,
    scale,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """out [B, Hq, S, DV]; one program a row and key head, which goes through the value blocks of its state."""
    head, row = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    dims = tl.arange(0, BD)
    k = k + row.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    v = v + row.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    s = s + row.to(tl.int64) * s_b + head.to(tl.int64) * s_h
    real = tokens
    if lengths is not None:
        real = tl.load(lengths + row).to(tl.int32)
    decay = 1.0
    if log_decay is not None:
        decay = tl.exp(tl.load(log_decay + head).to(tl.float32))
    before = tl.zeros([BD], tl.float32)
    if z is not None:
        z = z + row.to(tl.int64) * z_b + head.to(tl.int64) * z_h + dims
        before = tl.load(z, mask=dims < D, other=0.0)
    after = before
    for block in tl.static_range(0, (DV + BV - 1) // BV):
        columns = block * BV + tl.arange(0, BV)
        pointers = s + dims[:, None] * s_d + columns[None, :]
        mask = (dims < D)[:, None] & (columns < DV)[None, :]
        state = tl.load(pointers, mask=mask, other=0.0)
        after = before
        for t in range(0, tokens):
            alive = t < real
            key = apply_map(tl.load(k + t * k_s + dims, mask=(dims < D) & alive, other=0.0).to(tl.float32), MAP)
            key = tl.where((dims < D) & alive, key, 0.0)
            value = tl.load(v + t * v_s + columns, mask=(columns < DV) & alive, other=0.0).to(tl.float32)
            if log_decay is not None:
                fade = tl.where(alive, decay, 1.0)
                state, after = state * fade, after * fade
            state += key[:, None] * value[None, :]
            after += key
            for member in range(0, GROUP):
                q_head = head * GROUP + member
                at = q + row.to(tl.int64) * q_b + q_head.to(tl.int64) * q_h + t * q_s
                query = apply_map(tl.load(at + dims, mask=(dims < D) & alive, other=0.0).to(tl.float32), MAP)
                query = tl.where((dims < D) & alive, query, 0.0)
                read = tl.sum(query[:, None] * state, 0)
                if z is not None:
                    read = read * inverse_or_zero(tl.sum(query * after, 0))
                else:
                    read = read * scale
                to = out + ((row.to(tl.int64) * kv_heads * GROUP + q_head) * tokens + t) * DV + columns
                tl.store(to, read.to(out.dtype.element_ty), mask=columns < DV)
        tl.store(pointers, state, mask=mask)
    if z is not None:
        tl.store(z, after, mask=dims < D)
