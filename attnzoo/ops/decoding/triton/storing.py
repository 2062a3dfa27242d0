"""The next token of each row, put where a cache keeps it: keys and values, codes and all, in one launch."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    BEFORE, K, V, K_OUT, K_SCALE, V_OUT, V_SCALE, RECENT_K, RECENT_V, TABLE,
    size, recent_size, heads, table_stride,
    k_batch, k_head, v_batch, v_head,
    k_out_block, k_out_head, k_out_token, v_out_block, v_out_head, v_out_token,
    D: tl.constexpr, DV: tl.constexpr, QUANT: tl.constexpr, RING: tl.constexpr, RECENT: tl.constexpr,
    PREFIX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A program for each head and row. `K, V [B, H, 1, D]`; a row's token goes to position BEFORE[row]."""
    i_head = tl.program_id(0).to(tl.int64)
    i_row = tl.program_id(1).to(tl.int64)
    place = tl.load(BEFORE + i_row)
    i_block, slot = i_row, place
    if TABLE is not None:
        i_block = tl.load(TABLE + i_row * table_stride + place // size).to(tl.int64)
    if RING or TABLE is not None:
        slot = place % size
    scale_at = (i_block * heads + i_head) * size + slot
    recent_at = (i_row * heads + i_head) * recent_size
    if RECENT:
        recent_at += place % recent_size
    from_k, to_k = i_row * k_batch + i_head * k_head, i_block * k_out_block + i_head * k_out_head + slot * k_out_token
    store_vector(K + from_k, K_OUT + to_k, K_SCALE, RECENT_K, scale_at, recent_at, D, QUANT, RECENT, BLOCK_D)
    from_v, to_v = i_row * v_batch + i_head * v_head, i_block * v_out_block + i_head * v_out_head + slot * v_out_token
    store_vector(V + from_v, V_OUT + to_v, V_SCALE, RECENT_V, scale_at, recent_at, DV, QUANT, RECENT, BLOCK_DV)
    if PREFIX > 0 and place < PREFIX:  # beside the ring as well
        to_k += (size + place - slot) * k_out_token
        to_v += (size + place - slot) * v_out_token
        store_vector(K + from_k, K_OUT + to_k, None, None, 0, 0, D, False, False, BLOCK_D)
        store_vector(V + from_v, V_OUT + to_v, None, None, 0, 0, DV, False, False, BLOCK_DV)


@triton.jit
def store_vector(
    X, OUT, SCALE, RECENT_OUT, scale_at, recent_at,
    D: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One vector as it is, or as codes and a scale; and among the newest ones."""
    o_d = tl.arange(0, BLOCK_D)
    x = tl.load(X + o_d, mask=o_d < D, other=0.0)
    if RECENT:
        tl.store(RECENT_OUT + recent_at * D + o_d, x, mask=o_d < D)
    if QUANT:
        # As `Int8Storage.encode` rounds: exact divisions, ties to even (what 1.5 * 2**23 leaves of a small number).
        wide = x.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 0), 127.0), 1.1754943508222875e-38)
        codes = (tl.div_rn(wide, scale) + 12582912.0) - 12582912.0
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(OUT + o_d, codes.to(tl.int8), mask=o_d < D)
        tl.store(SCALE + scale_at, scale)
    else:
        tl.store(OUT + o_d, x, mask=o_d < D)
