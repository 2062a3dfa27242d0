"""The gradient of an additive bias, summed over the batch entries and heads that share it.

A kernel of its own, as only learned biases pay for it: it computes the scores once more, and owns what it writes.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.tiles import LOG2E, UNSPECIALISED, kept, load_rows, masked, score


@triton.jit(do_not_specialize=UNSPECIALISED)
def bias_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    d_bias,  # [biases of the batch, biases of the heads, Sq, Sk], contiguous
    slopes,
    bias,
    dense,
    key_lengths,
    tables,
    seed,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_rows,
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    stride_dense_b,
    stride_dense_h,
    stride_dense_q,
    stride_dense_k,
    stride_slopes,
    batches,
    heads,
    bias_batches,
    bias_heads,
    q_len,
    k_len,
    window,
    ahead,
    scale,
    softcap,
    dropout_p,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PROGRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """One tile of the bias. It walks all batch entries and heads to which the bias is added."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(k_len, BLOCK_N)
    tiles_m = tl.cdiv(q_len, BLOCK_M)
    start_n = program % tiles_n * BLOCK_N
    start_m = program // tiles_n % tiles_m * BLOCK_M
    place = program // tiles_n // tiles_m
    own_head = place % bias_heads
    own_batch = place // bias_heads
    shift = k_len - q_len
    t_row = start_m + tl.arange(0, BLOCK_M)
    u_row = start_n + tl.arange(0, BLOCK_N)
    t = t_row[:, None]
    u = u_row[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shared_heads = heads // bias_heads
    for n in tl.range(0, shared_heads * (batches // bias_batches)):
        head = own_head + n % shared_heads  # own_head is 0 wherever heads share
        batch = own_batch + n // shared_heads
        head_k = head // GROUP
        q_base = q + tl.cast(batch, tl.int64) * stride_qb + tl.cast(head, tl.int64) * stride_qh
        k_base = k + tl.cast(batch, tl.int64) * stride_kb + tl.cast(head_k, tl.int64) * stride_kh
        v_base = v + tl.cast(batch, tl.int64) * stride_vb + tl.cast(head_k, tl.int64) * stride_vh
        do_base = d_out + tl.cast(batch, tl.int64) * stride_dob + tl.cast(head, tl.int64) * stride_doh
        bias_base = bias + tl.cast(batch, tl.int64) * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
        dense_base = dense
        if dense is not None:
            dense_base += tl.cast(batch, tl.int64) * stride_dense_b + tl.cast(head, tl.int64) * stride_dense_h
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + batch * stride_slopes + head).to(tl.float32)
        seen = k_len
        if key_lengths is not None:
            seen = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), k_len)
        inside = (t < q_len) & (u < seen)
        q0 = load_rows(q_base, start_m, stride_qs, t_row < q_len, BLOCK_M, 0, BLOCK_D, D)
        k0 = load_rows(k_base, start_n, stride_ks, u_row < seen, BLOCK_N, 0, BLOCK_D, D)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if BLOCK_E > 0:
            q1 = load_rows(q_base, start_m, stride_qs, t_row < q_len, BLOCK_M, BLOCK_D, BLOCK_E, D)
            k1 = load_rows(k_base, start_n, stride_ks, u_row < seen, BLOCK_N, BLOCK_D, BLOCK_E, D)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        do = load_rows(do_base, start_m, stride_dos, t_row < q_len, BLOCK_M, 0, BLOCK_DV, DV)
        vt = load_rows(v_base, start_n, stride_vs, u_row < seen, BLOCK_N, 0, BLOCK_DV, DV)
        dp = tl.dot(do, tl.trans(vt), input_precision=PRECISION)
        s, _bent = score(
            s, scale, softcap, slope, t + shift, u, bias_base, stride_bias_q, stride_bias_k, t, u, inside,
            softcap is not None, slopes is not None, 1, FAST,
        )  # fmt: skip
        rows = (tl.cast(batch, tl.int64) * heads + head) * q_len + t
        padded = (tl.cast(batch, tl.int64) * heads + head) * stride_rows + t
        row_lse = tl.load(lse + rows, mask=t < q_len, other=float("inf"))
        row_delta = tl.load(delta + padded, mask=t < q_len, other=0.0)
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # blind rows, perhaps by the bias itself
        p = tl.exp2(s - row_lse * LOG2E)
        if seed is not None:
            dp = tl.where(kept(seed, batch * heads + head, t, u, dropout_p), dp * (1.0 / (1.0 - dropout_p)), 0.0)
        ds = tl.where(p == 0.0, 0.0, p * (dp - row_delta))  # a key that nobody sees may be NaN, and so its dp
        acc += masked(
            ds, 0.0, t + shift, u, inside, window, ahead, PROGRAM, tables, head, dense_base, stride_dense_q,
            stride_dense_k, t, u, LEFT, RIGHT,
        )  # fmt: skip
    base = d_bias + (tl.cast(own_batch, tl.int64) * bias_heads + own_head) * q_len * k_len
    at = base + tl.cast(t, tl.int64) * k_len + u
    tl.store(at, acc.to(d_bias.dtype.element_ty), mask=(t < q_len) & (u < k_len))
