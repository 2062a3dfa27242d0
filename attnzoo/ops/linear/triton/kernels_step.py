"""One token, or a few, over a state that is updated in place: read once, written once.

A program has a row and key head to itself, and goes through the blocks of the values' columns of its state.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import apply_map
from attnzoo.ops.linear.triton.tiles import head_base, load_tile
from attnzoo.ops.linear.triton.weights import decay_since, decay_until, inverse_or_zero, mask_weights


@triton.jit
def load_vector(x, width, alive, BLOCK: tl.constexpr):
    """[BLOCK] in fp32, 0 from `width` on and if not `alive`."""
    columns = tl.arange(0, BLOCK)
    return tl.load(x + columns, mask=(columns < width) & alive, other=0.0).to(tl.float32)


@triton.jit
def load_mapped(x, alive, MAP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The features [BD] of one token in fp32, 0 beyond D and if not `alive`."""
    found = apply_map(load_vector(x, D, alive, BD), MAP)
    if MAP == "elu":
        found = tl.where((tl.arange(0, BD) < D) & alive, found, 0.0)
    return found


@triton.jit
def step_token(
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
    k_b,
    k_h,
    v_b,
    v_h,
    s_b,
    s_h,
    s_d,
    z_b,
    z_h,
    scale,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """out [B, Hq, 1, DV]. The state is written before the outputs are summed: what waits for all warps comes last."""
    head, row = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0) * GROUP
    dims = tl.arange(0, BD)
    s = head_base(s, row, head, s_b, s_h)
    alive = True
    if lengths is not None:
        alive = tl.load(lengths + row) > 0
    key = load_mapped(head_base(k, row, head, k_b, k_h), alive, MAP, D, BD)
    after = key
    fade = 1.0
    if log_decay is not None:
        fade = tl.where(alive, tl.exp(tl.load(log_decay + head).to(tl.float32)), 1.0)
    if z is not None:
        z = head_base(z, row, head, z_b, z_h)
        after = load_vector(z, D, True, BD) * fade + key
    for block in tl.static_range(0, (DV + BV - 1) // BV):
        columns = block * BV + tl.arange(0, BV)
        pointers = s + dims[:, None] * s_d + columns[None, :]
        mask = (dims < D)[:, None] & (columns < DV)[None, :]
        value = load_vector(head_base(v, row, head, v_b, v_h) + block * BV, DV - block * BV, alive, BV)
        state = tl.load(pointers, mask=mask, other=0.0) * fade + key[:, None] * value[None, :]
        tl.store(pointers, state, mask=mask)
        for member in tl.static_range(0, GROUP):
            q_head = head * GROUP + member
            query = load_mapped(head_base(q, row, q_head, q_b, q_h), alive, MAP, D, BD)
            read = tl.sum(query[:, None] * state, 0)
            if z is not None:
                read = read * inverse_or_zero(tl.sum(query * after, 0))
            else:
                read = read * scale
            to = out + (row.to(tl.int64) * heads + q_head) * DV + columns
            tl.store(to, read.to(out.dtype.element_ty), mask=columns < DV)
    if z is not None:
        tl.debug_barrier()  # z has been read by all
        tl.store(z + dims, after, mask=dims < D)


@triton.jit
def sum_exactly(a, b, c):
    """c + a^T b in fp32, where a is of fp32: three products of bf16 pieces if b is of bf16."""
    if b.dtype == tl.bfloat16:
        for _piece in tl.static_range(0, 3):
            high = a.to(b.dtype)
            c = tl.dot(tl.trans(high), b, c)
            a = a - high.to(tl.float32)
    else:
        c = tl.dot(tl.trans(a), b, c, input_precision="ieee")
    return c


@triton.jit
def multiply(a, b, c, PIECES: tl.constexpr):
    """c + a b of fp32, nearly as accurately: three products of bf16 pieces if PIECES."""
    if PIECES:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        c = tl.dot(a_high, b_high, c)
        c = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, c)
        c = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), c)
    else:
        c = tl.dot(a, b, c, input_precision="ieee")
    return c


@triton.jit
def step_tokens(
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
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """out [B, Hq, S, DV] of at most CHUNK tokens, looked at together as in the forward."""
    head, row = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0) * GROUP
    dims, token = tl.arange(0, BD), tl.arange(0, CHUNK)
    s = head_base(s, row, head, s_b, s_h)
    v = head_base(v, row, head, v_b, v_h)
    real = tokens
    if lengths is not None:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), tokens)
    exact = (token < real)[:, None] & (dims < D)[None, :]
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    keys = load_tile(head_base(k, row, head, k_b, k_h), k_s, 0, 0, real, D, CHUNK, BD, BD == D, False).to(tl.float32)
    keys = tl.where(exact, apply_map(keys, MAP), 0.0)
    late = keys
    fade = 1.0
    if log_decay is not None:
        late = keys * decay_until(rate, real, CHUNK)[:, None]
        fade = tl.exp(rate * real.to(tl.float32))
    before = tl.zeros([BD], tl.float32)
    if z is not None:
        z = head_base(z, row, head, z_b, z_h) + dims
        before = tl.load(z, mask=dims < D, other=0.0)
    for block in tl.static_range(0, (DV + BV - 1) // BV):
        columns = block * BV + tl.arange(0, BV)
        pointers = s + dims[:, None] * s_d + columns[None, :]
        mask = (dims < D)[:, None] & (columns < DV)[None, :]
        state = tl.load(pointers, mask=mask, other=0.0)
        values = load_tile(v + block * BV, v_s, 0, 0, real, DV - block * BV, CHUNK, BV, DV % BV == 0, False)
        if not PIECES:
            values = values.to(tl.float32)
        tl.store(pointers, sum_exactly(late, values, state * fade), mask=mask)
        for member in range(0, GROUP):
            q_head = head * GROUP + member
            queries = load_tile(head_base(q, row, q_head, q_b, q_h), q_s, 0, 0, real, D, CHUNK, BD, BD == D, False)
            queries = tl.where(exact, apply_map(queries.to(tl.float32), MAP), 0.0)
            weights = multiply(queries, tl.trans(keys), tl.zeros([CHUNK, CHUNK], tl.float32), PIECES)
            weights = mask_weights(weights, rate, False, CHUNK)
            read = multiply(queries, state, tl.zeros([CHUNK, BV], tl.float32), PIECES)
            weight = tl.sum(queries * before[None, :], 1)
            if log_decay is not None:
                since = decay_since(rate, CHUNK)
                read, weight = read * since[:, None], weight * since
            read = multiply(weights, values.to(tl.float32), read, PIECES)
            if z is not None:
                read = read * inverse_or_zero(weight + tl.sum(weights, 1))[:, None]
            else:
                read = read * scale
            to = out + ((row.to(tl.int64) * heads + q_head) * tokens + token[:, None]) * DV + columns[None, :]
            tl.store(to, read.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (columns < DV)[None, :])
    if z is not None:
        tl.debug_barrier()  # z has been read by all
        tl.store(z, before * fade + tl.sum(late, 0), mask=dims < D)
