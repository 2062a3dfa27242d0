"""Merging what the splits of a query have found, by its logsumexp."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.tiles import DEAD, LOG2E

GIVEN_UP = tl.constexpr(2**40)
PATIENCE = tl.constexpr(64)  # looks at the counter, less than a microsecond each


@triton.jit
def merge_here(
    PART, LSE, SINKS, OUT, ARRIVED, group, base, head, m0, rows, i_split, splits,
    Q_LEN: tl.constexpr, DV: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
):  # fmt: skip
    """Merge at the end of the kernel that has made the parts, which saves a launch.

    `ARRIVED[group]` counts the programs that have stored their parts of queries `base + m0, ..., base + rows - 1`, up
    to BLOCK_M of them: those of each call add `splits` to it. The last to come merges all queries; with SHARE each
    program merges so many, once all have come. One that has waited too long leaves its queries to the last, and says
    so in the upper bits of the count; so nobody waits for a program that cannot start.
    """
    tl.debug_barrier()  # every thread has stored its numbers before one of them counts
    place = ARRIVED + group
    before = tl.atomic_add(place, 1, sem="acq_rel")
    count = before % GIVEN_UP + 1
    first, end = m0, tl.minimum(m0 + BLOCK_M, rows)
    if SHARE == 0:
        end = tl.where(count % splits == 0, end, first)
    else:
        whole = end
        first += i_split * SHARE
        end = tl.minimum(first + SHARE, whole)
        if count % splits == 0:
            gone = before // GIVEN_UP
            if gone > 0:
                tl.atomic_add(place, -gone * GIVEN_UP)
                first, end = m0, whole
        elif first < end:
            complete = (count // splits + 1) * splits
            looks = 0
            while (count < complete) & (looks < PATIENCE):
                count = tl.atomic_add(place, 0, sem="acquire") % GIVEN_UP
                looks += 1
            if count < complete:
                count = tl.atomic_add(place, GIVEN_UP, sem="acq_rel") % GIVEN_UP
                if count < complete:
                    end = first
                else:  # all have come after all
                    tl.atomic_add(place, -GIVEN_UP)
    merge_rows(PART, LSE, SINKS, OUT, base, head, first, end, splits, Q_LEN, DV, MERGE_M, MERGE_S, MERGE_DV)


@triton.jit
def merge_rows(
    PART, LSE, SINKS, OUT, base, head, first, end, splits,
    Q_LEN: tl.constexpr, DV: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
):  # fmt: skip
    """Merge queries `base + first, ..., base + end - 1`; `head` is that of query `base`."""
    o_s = tl.arange(0, MERGE_S)
    for m0 in tl.range(first, end, MERGE_M, num_stages=1):
        m = m0 + tl.arange(0, MERGE_M)
        row = base + m
        there = (m < end)[:, None] & (o_s < splits)[None, :]
        part = row[:, None] * splits + o_s[None, :]  # [MERGE_M, MERGE_S]
        b_lse = tl.load(LSE + part, mask=there, other=DEAD, cache_modifier=".cg")
        b_part = load_parts(PART, part, there, 0, DV, MERGE_DV)  # before the weights, so that it waits for nothing
        top = tl.max(b_lse, 1)
        top = tl.where(top == DEAD, 0.0, top)
        b_w = tl.exp2((b_lse - top[:, None]) * LOG2E)
        total = tl.sum(b_w, 1)
        if SINKS is not None:
            sink = tl.load(SINKS + head + m // Q_LEN, mask=m < end, other=DEAD).to(tl.float32)
            total += tl.where(total > 0, tl.exp2((sink - top) * LOG2E), 0.0)
        b_w *= tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        for at in tl.static_range(0, DV, MERGE_DV):
            if at > 0:
                b_part = load_parts(PART, part, there, at, DV, MERGE_DV)
            b_out = tl.sum(b_part * b_w[:, :, None], 1)
            o_dv = at + tl.arange(0, MERGE_DV)
            mask = (m < end)[:, None] & (o_dv < DV)[None, :]
            tl.store(OUT + row[:, None] * DV + o_dv[None, :], b_out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def load_parts(PART, part, there, at, DV: tl.constexpr, MERGE_DV: tl.constexpr):
    """Columns `at, ..., at + MERGE_DV - 1` of parts, `[MERGE_M, MERGE_S, MERGE_DV]`."""
    o_dv = at + tl.arange(0, MERGE_DV)
    mask = there[:, :, None] & (o_dv < DV)[None, None, :]
    # Not from the L1 cache, which knows nothing of other programs' stores.
    return tl.load(PART + part[:, :, None] * DV + o_dv[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")


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
