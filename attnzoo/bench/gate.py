"""When a contestant's numbers count: its error is at most twice that of plain PyTorch in bf16, against fp32.

The truth is computed for one key head of the last batch and all its query heads, at full length, some queries at a
time; outputs and every gradient of those heads are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.bench.cases import Case
from attnzoo.bench.contestants import Data

CHUNK = 512  # queries at once


def one_head(case: Case, data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """`out`, `dq`, `dk`, `dv` (and `dsinks`) of the last key head of the last batch: `[G, S, D]` and `[S, D]`, fp32.

    In fp32 that is the truth; in bf16 what plain PyTorch would give, with dK and dV summed over chunks in fp32.
    """
    group = case.q_heads // case.k_heads
    q, d_out = (t.detach()[-1, :, -group:].transpose(0, 1).to(dtype) for t in (data.q, data.d_out))  # [G, S, D]
    k, v = (t.detach()[-1, :, -1].to(dtype) for t in (data.k, data.v))  # [S, D]
    scale = case.dim**-0.5
    mask, j = case.whole_mask, torch.arange(case.length, device=q.device)
    out, d_q = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q, dtype=torch.float32)
    d_k, d_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    sinks = None if data.sinks is None else data.sinks.detach()[-group:].to(dtype)[:, None, None]
    d_sinks = torch.zeros(group, device=q.device)
    for start in range(0, case.length, CHUNK):
        rows = slice(start, start + CHUNK)
        some, d_some, i = q[:, rows], d_out[:, rows], j[rows, None]
        scores = (some @ k.T) * scale  # [G, chunk, S]
        slope: Tensor | float = 1.0
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
            slope = 1 - (scores / case.softcap) ** 2
        if data.slopes is not None:
            scores = scores - data.slopes[-group:, None, None].to(dtype) * (i - j).abs()
        scores = scores.masked_fill(~mask.visible(i, j[None]), -torch.inf)
        p = torch.softmax(scores if sinks is None else torch.cat([scores, sinks.expand(-1, len(i), 1)], -1), -1)
        p_sink = None if sinks is None else p[..., -1]
        p = p if sinks is None else p[..., :-1]
        out[:, rows] = p @ v
        d_p = d_some @ v.T
        delta = (p * d_p).sum(-1, keepdim=True)
        d_scores = p * (d_p - delta) * slope * scale
        d_q[:, rows] = d_scores @ k
        d_k += torch.einsum("gqk,gqd->kd", d_scores, some)
        d_v += torch.einsum("gqk,gqd->kd", p, d_some)
        if p_sink is not None:
            d_sinks -= (p_sink * delta[..., 0]).sum(1).float()
    found = {"out": out, "dq": d_q, "dk": d_k, "dv": d_v}
    return found if sinks is None else found | {"dsinks": d_sinks}


def same_head(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A contestant's `[B, S, H, D]` results of the heads that `one_head` computes."""
    group = case.q_heads // case.k_heads
    found = {}
    for name, t in tensors.items():
        if name == "dsinks":
            if case.batch == 1:  # else it is summed over batches that were not computed
                found[name] = t.detach()[-group:].float()
        elif name in ("out", "dq"):
            found[name] = t.detach()[-1, :, -group:].transpose(0, 1).float()
        else:
            found[name] = t.detach()[-1, :, -1].float()
    return found


def worst(got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error over what is allowed, and where; up to 1 is right.

    Allowed is twice plain PyTorch's error, and four eps of the largest value: for the maximum, the mean and the worst
    row of every tensor.
    """
    largest, where = 0.0, ""
    for name, t in got.items():
        floor = 4 * torch.finfo(torch.bfloat16).eps * truth[name].abs().max().item()
        ours, theirs = (t - truth[name]).abs(), (plain[name].bfloat16().float() - truth[name]).abs()
        if not ours.isfinite().all():
            return float("inf"), f"{name}: not finite"
        for what, a, b in (
            ("maximum", ours.max(), theirs.max()),
            ("mean", ours.mean(), theirs.mean()),
            ("worst row", ours.mean(-1).max(), theirs.mean(-1).max()),
        ):
            ratio = a.item() / (2 * b.item() + floor)
            if ratio >= largest:
                largest, where = ratio, f"{name}: {what}"
    return largest, where
