"""Merging what the splits of a query have found, by its logsumexp."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.tiles import DEAD, LOG2E


@triton.jit
def merge_here(
    PART, LSE, SINKS, OUT, ARRIVED, group, base, head, m0, rows, i_split, splits,
    Q_LEN: tl.constexpr, DV: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
):  # fmt: skip
    """Merge at the end of the kernel that has made the parts, which saves a launch.

    `ARRIVED[group]` counts the programs that have stored their parts of queries `base + m0, ..., base + rows - 1`, up
    to BLOCK_M of them: those of each call add `splits` to it, and none before all of the call before. With SHARE each
    program waits for the others and then merges so many queries; without, the last one to come merges them all.
    """
    tl.debug_barrier()  # every thread has stored its numbers before one of them counts
    before = tl.atomic_add(ARRIVED + group, 1, sem="acq_rel")
    if SHARE == 0:
        if (before + 1) % splits == 0:
            merge_rows(
                PART, LSE, SINKS, OUT, base, head, m0, tl.minimum(m0 + BLOCK_M, rows), splits,
                Q_LEN, DV, MERGE_M, MERGE_S, MERGE_DV,
            )  # fmt: skip
    else:
        m = m0 + i_split * SHARE
        end = tl.minimum(m0 + BLOCK_M, rows)
        if m < end:
            counted = before + 1
            complete = (before // splits + 1) * splits
            while counted < complete:
                counted = tl.atomic_add(ARRIVED + group, 0, sem="acquire")
            merge_rows(
                PART, LSE, SINKS, OUT, base, head, m, tl.minimum(m + SHARE, end), splits,
                Q_LEN, DV, MERGE_M, MERGE_S, MERGE_DV,
            )  # fmt: skip


@triton.jit
def merge_rows(
    PART, LSE, SINKS, OUT, base, head, first, end, splits,
    Q_LEN: tl.constexpr, DV: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
):  # fmt: skip
    """Merge queries `base + first, ..., base + end - 1`; `head` is that of query `base`."""
    o_s = tl.arange(0, MERGE_S)
    for m0 in range(first, end, MERGE_M):
        m = m0 + tl.arange(0, MERGE_M)
        row = base + m
        there = (m < end)[:, None] & (o_s < splits)[None, :]
        part = row[:, None] * splits + o_s[None, :]  # [MERGE_M, MERGE_S]
        b_lse = tl.load(LSE + part, mask=there, other=DEAD, cache_modifier=".cg")
        top = tl.max(b_lse, 1)
        top = tl.where(top == DEAD, 0.0, top)
        b_w = tl.exp2((b_lse - top[:, None]) * LOG2E)
        total = tl.sum(b_w, 1)
        if SINKS is not None:
            sink = tl.load(SINKS + head + m // Q_LEN, mask=m < end, other=DEAD).to(tl.float32)
            total += tl.where(total > 0, tl.exp2((sink - top) * LOG2E), 0.0)
        b_w *= tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        for at in tl.static_range(0, DV, MERGE_DV):
            o_dv = at + tl.arange(0, MERGE_DV)
            real = (o_dv < DV)[None, :]
            b_part = tl.load(
                PART + part[:, :, None] * DV + o_dv[None, None, :],
                mask=there[:, :, None] & real[None, :, :],
                other=0.0,
                cache_modifier=".cg",
            )
            b_out = tl.sum(b_part * b_w[:, :, None], 1)
            tl.store(
                OUT + row[:, None] * DV + o_dv[None, :], b_out.to(OUT.dtype.element_ty), mask=(m < end)[:, None] & real
            )


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART,  # [rows, splits, DV], then their logsumexps [rows, splits]; a row is a query of a head
    OUT,  # [rows, DV]
    splits,
    DV: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
):  # fmt: skip
    """Merge in a kernel of its own, a query each program."""
    i_row = tl.program_id(0).to(tl.int64)
    LSE = PART + tl.num_programs(0).to(tl.int64) * splits * DV
    merge_rows(PART, LSE, None, OUT, i_row, 0, 0, 1, splits, 1, DV, MERGE_M, MERGE_S, MERGE_DV)
