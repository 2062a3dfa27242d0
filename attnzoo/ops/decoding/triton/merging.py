"""Merging what the splits of a query have found."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.tiles import DEAD, LOG2E


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART, LSE, SINKS, OUT,  # [rows, splits, DV], [rows, splits], [heads], [rows, DV]; a row is a query of a head
    splits, heads,
    Q_LEN: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query: their shares weighted by their logsumexp."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_lse = tl.load(LSE + i_row * splits + o_s, mask=o_s < splits, other=DEAD)
    top = tl.max(b_lse, 0)
    top = tl.where(top == DEAD, 0.0, top)
    b_w = tl.exp2((b_lse - top) * LOG2E)
    total = tl.sum(b_w, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + (i_row // Q_LEN) % heads).to(tl.float32)
        total += tl.where(total > 0, tl.exp2((sink - top) * LOG2E), 0.0)
    b_part = tl.load(
        PART + (i_row * splits + o_s)[:, None] * DV + o_dv[None, :],
        mask=(b_w > 0)[:, None] & (o_dv[None, :] < DV),
        other=0.0,
    )
    b_out = tl.sum(b_part * b_w[:, None], 0) * tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(OUT + i_row * DV + o_dv, b_out.to(OUT.dtype.element_ty), mask=o_dv < DV)
