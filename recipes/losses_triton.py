"""The same as `recipes.losses_rows` in one kernel: a chunk's logits are read, and overwritten by their gradient.

A program takes a row and walks over it twice, for the sums and for the gradient. The second time the row comes out of
the cache, so that a chunk crosses the memory bus once in each direction.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.launcher import Launcher
from recipes.losses_rows import IGNORED, LEAST_REST, Rule


def losses_of_rows(
    logits: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    rows: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    cross_entropy: Tensor,
    kl: Tensor,
    rule: Rule,
) -> None:
    """See `recipes.losses_rows.losses_of_rows`; the sums are fp32."""
    tokens, vocabulary = logits.shape
    if tokens == 0:
        return
    ids, logprobs = (None if t is None else t.contiguous() for t in (ids, logprobs))
    arguments = (
        *(logits, teacher, targets, rows, ids, logprobs, cross_entropy, kl),
        *(logits.stride(0), 0 if teacher is None else teacher.stride(0), vocabulary),
        0 if ids is None else ids.shape[1],
        *(rule.scale, rule.softcap, rule.teacher_scale, rule.teacher_softcap, 1 / rule.temperature),
        *(rule.ce_weight, rule.kl_weight),
    )
    block, warps = tile(vocabulary, alone=teacher is None)
    constants = constants_of(min(block, triton.next_power_of_2(vocabulary))) | {
        "CAPPED": rule.softcap > 0,
        "TEACHER_CAPPED": rule.teacher_softcap > 0,
        "TEMPERED": rule.temperature != 1,
        "GRADIENT": rule.gradient,
        "TOP": 0 if ids is None else triton.next_power_of_2(ids.shape[1]),
    }
    _launch((tokens,), arguments, constants, num_warps=warps, num_stages=1)


def tile(vocabulary: int, *, alone: bool) -> tuple[int, int]:
    """Columns at once and warps. Few, wide programs keep all their rows in the cache, as long as rows are short."""
    if not alone:
        return 4096, 4
    return (16384, 16) if vocabulary <= 1 << 16 else (8192, 8)


def constants_of(block: int) -> dict[str, Any]:
    """The kernel's constants for plain logits."""
    return {
        **{"CAPPED": False, "TEACHER_CAPPED": False, "TEMPERED": False, "GRADIENT": True, "TOP": 0},
        **{"BLOCK": block, "UNTARGETED": IGNORED, "LEAST": LEAST_REST},
    }


@triton.jit
def curve(raw, scale, softcap, CAPPED: tl.constexpr):
    y = raw * scale
    if CAPPED:  # -inf stays: columns past the end, and what the top k took
        y = tl.where(y == float("-inf"), y, softcap * (2 / (1 + tl.exp(-2 * y / softcap)) - 1))
    return y


@triton.jit
def slope(y, scale, softcap, CAPPED: tl.constexpr):
    d = scale
    if CAPPED:
        d = tl.where(y == float("-inf"), 0.0, scale * (1 - (y / softcap) * (y / softcap)))
    return d


@triton.jit
def rows_kernel(
    logits,  # [n, V], becomes the gradient
    teacher,  # [n, V] or None
    targets,  # [n] or None
    rows,  # [n] or None
    ids,  # [n, k] or None
    logprobs,  # [n, k] or None
    cross_entropy,  # [n] fp32
    kl,  # [n] fp32
    stride_logits,
    stride_teacher,
    vocabulary,
    top,  # k
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    cooling,  # 1 / temperature
    ce_weight,
    kl_weight,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    TOP: tl.constexpr,  # a power of 2 that holds k; 0 without a teacher's top k
    BLOCK: tl.constexpr,
    UNTARGETED: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = logits + row * stride_logits
    lanes = tl.arange(0, BLOCK)
    KL: tl.constexpr = (teacher is not None) or (TOP > 0)

    # What counts in this row.
    has_target = False
    target = 0
    y_target = 0.0
    if targets is not None:
        target = tl.load(targets + row).to(tl.int32)
        has_target = target != UNTARGETED
        inside = has_target & (target >= 0) & (target < vocabulary)
        raw_target = tl.load(p_row + target, mask=inside, other=float("nan")).to(tl.float32)
        y_target = curve(raw_target, scale, softcap, CAPPED)
    has_kl = KL
    if KL and rows is not None:
        has_kl = tl.load(rows + row).to(tl.int1)
    end = tl.where(has_target | has_kl, vocabulary, 0)

    # The top k are taken out of the row, so that the probability of the rest is a sum and no difference.
    if TOP > 0:
        places = tl.arange(0, TOP)
        taken = (places < top) & has_kl
        b_ids = tl.load(ids + row * top + places, mask=taken, other=0).to(tl.int32)  # [TOP]
        log_p = tl.load(logprobs + row * top + places, mask=taken, other=float("-inf")).to(tl.float32)
        raw_top = tl.load(p_row + b_ids, mask=taken, other=float("-inf")).to(tl.float32)
        y_top = curve(raw_top, scale, softcap, CAPPED)
        tl.debug_barrier()
        tl.store(p_row + b_ids, tl.full((TOP,), float("-inf"), logits.dtype.element_ty), mask=taken)
    tl.debug_barrier()

    # Sums of exp(y - most), of the same at the temperature, and the teacher's with its mean of both scores' difference.
    zero = tl.full((), 0.0, tl.float32)
    most, sum_1, sum_t = zero - 1e30, zero, zero
    most_p, sum_p, mean = zero - 1e30, zero, zero
    for start in range(0, end, BLOCK):
        columns = start + lanes
        raw = tl.load(p_row + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        y = curve(raw, scale, softcap, CAPPED)  # [BLOCK]
        larger = tl.maximum(most, tl.max(y, 0))
        sum_1 = sum_1 * tl.exp(most - larger) + tl.sum(tl.exp(y - larger), 0)
        if TEMPERED:
            sum_t = sum_t * tl.exp((most - larger) * cooling) + tl.sum(tl.exp((y - larger) * cooling), 0)
        most = larger
        if teacher is not None:
            p_teacher = teacher + row * stride_teacher + columns
            raw = tl.load(p_teacher, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
            z = curve(raw, teacher_scale, teacher_softcap, TEACHER_CAPPED) * cooling
            larger = tl.maximum(most_p, tl.max(z, 0))
            e = tl.exp(z - larger)
            apart = tl.where(e > 0, e * (z - y * cooling), 0.0)
            shrink = tl.exp(most_p - larger)
            sum_p = sum_p * shrink + tl.sum(e, 0)
            mean = mean * shrink + tl.sum(apart, 0)
            most_p = larger
    if not TEMPERED:
        sum_t = sum_1

    # exp(y - most) times the shares are the probabilities; the top k join only now.
    all_1, all_t, highest = sum_1, sum_t, most
    if TOP > 0:
        highest = tl.maximum(most, tl.max(y_top, 0))
        e_1 = tl.exp(y_top - highest)
        e_t = tl.exp((y_top - highest) * cooling)
        all_1 = sum_1 * tl.exp(most - highest) + tl.sum(e_1, 0)
        all_t = sum_t * tl.exp((most - highest) * cooling) + tl.sum(e_t, 0)
    share_1 = tl.exp(most - highest) / all_1
    share_t = tl.exp((most - highest) * cooling) / all_t
    if targets is not None:
        tl.store(cross_entropy + row, tl.where(has_target, highest - y_target + tl.log(all_1), 0.0))
    if TOP > 0:
        p = tl.exp(log_p)
        p_rest = 1 - tl.sum(p, 0)
        p_rest = tl.where(p_rest > LEAST, p_rest, 0.0)
        log_q = (y_top - highest) * cooling - tl.log(all_t)
        log_q_rest = (most - highest) * cooling + tl.log(sum_t) - tl.log(all_t)
        value = tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
        value += tl.where(p_rest > 0, p_rest * (tl.log(p_rest) - log_q_rest), 0.0)
        tl.store(kl + row, tl.where(has_kl, value, 0.0))
        share_t -= tl.where(p_rest > 0, p_rest / sum_t, 0.0)
    if teacher is not None:
        value = mean / sum_p - (most_p + tl.log(sum_p)) + most * cooling + tl.log(sum_t)
        tl.store(kl + row, tl.where(has_kl, value, 0.0))

    if GRADIENT:
        tl.debug_barrier()  # nobody writes before all have read
        kl_weight *= cooling
        factor_1 = tl.where(has_target, ce_weight * share_1, 0.0)
        factor_t = tl.where(has_kl, kl_weight * share_t, 0.0)
        at_target = tl.where(has_target, ce_weight * slope(y_target, scale, softcap, CAPPED), 0.0)
        factor_p = 0.0
        if teacher is not None:
            factor_p = tl.where(has_kl, kl_weight / sum_p, 0.0)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            here = (columns < vocabulary) & (has_target | has_kl)
            raw_y = tl.load(p_row + columns, mask=here, other=float("-inf")).to(tl.float32)
            y = curve(raw_y, scale, softcap, CAPPED)
            e = tl.exp(y - most)
            d = e * (factor_1 if TEMPERED or not KL else factor_1 + factor_t)
            if TEMPERED and KL:
                d += tl.exp((y - most) * cooling) * factor_t
            if teacher is not None:
                p_teacher = teacher + row * stride_teacher + columns
                raw_z = tl.load(p_teacher, mask=here, other=float("-inf")).to(tl.float32)
                z = curve(raw_z, teacher_scale, teacher_softcap, TEACHER_CAPPED) * cooling
                d -= tl.exp(z - most_p) * factor_p
            d *= slope(y, scale, softcap, CAPPED)
            if targets is not None:
                d -= tl.where(columns == target, at_target, 0.0)
            tl.store(p_row + columns, d.to(logits.dtype.element_ty), mask=columns < vocabulary)
        if TOP > 0:
            d_top = kl_weight * (e_t / all_t - p)
            if targets is not None:
                d_top_ce = e_1 / all_1 - tl.where(b_ids == target, 1.0, 0.0)
                d_top += tl.where(has_target, ce_weight * d_top_ce, 0.0)
            d_top *= slope(y_top, scale, softcap, CAPPED)
            tl.debug_barrier()
            tl.store(p_row + b_ids, d_top.to(logits.dtype.element_ty), mask=taken)


_launch = Launcher(rows_kernel)
