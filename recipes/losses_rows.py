"""Cross-entropy and divergence of a chunk of logits, and the logits' gradient, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
LEAST_REST = 1e-6  # probability that the teacher's top k leave: what is below is rounding


class Rule(NamedTuple):
    """The numbers of a loss; a softcap of 0 means none."""

    softcap: float
    scale: float
    teacher_softcap: float
    teacher_scale: float
    temperature: float
    ce_weight: float
    kl_weight: float
    gradient: bool  # whether the logits' gradient is made


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
    """Write each row's losses to `cross_entropy` and `kl` `[n]`, and where asked for the gradient into `logits`.

    Args:
        logits, teacher: `[n, V]`, products of hidden states and head, before scale and softcap.
        targets: `[n]` integers, IGNORED where there is none; None for no cross-entropy.
        rows: bool `[n]`, the rows of the divergence; None for all.
        ids, logprobs: `[n, k]`, a teacher's top k in place of `teacher`.
        cross_entropy, kl: zeros `[n]` in fp32 (fp64).
    """
    sums = cross_entropy.dtype
    y = _curve(logits.to(sums), rule.scale, rule.softcap)
    gradient = torch.zeros_like(y)
    if targets is not None:
        valid = targets != IGNORED
        at = targets.clamp(min=0).long()[:, None]
        log_q = y.log_softmax(-1)
        cross_entropy.copy_(torch.where(valid, -log_q.gather(1, at)[:, 0], 0))
        d = log_q.exp_().scatter_add_(1, at, log_q.new_full(at.shape, -1.0))
        gradient += (rule.ce_weight * d).masked_fill_(~valid[:, None], 0)
    if teacher is not None or ids is not None:
        x = y / rule.temperature
        if teacher is not None:
            soft = _curve(teacher.to(sums), rule.teacher_scale, rule.teacher_softcap) / rule.temperature
            value, d = _divergence(x, soft)
        else:
            value, d = _divergence_of_top(x, ids.long(), logprobs.to(sums))
        d *= rule.kl_weight / rule.temperature
        if rows is not None:
            value, d = value.where(rows, 0), d.masked_fill_(~rows[:, None], 0)
        kl.copy_(value)
        gradient += d
    if rule.gradient:
        slope = rule.scale if not rule.softcap else rule.scale * (1 - (y / rule.softcap) ** 2)
        logits.copy_(gradient * slope)


def _curve(raw: Tensor, scale: float, softcap: float) -> Tensor:
    y = raw * scale
    return softcap * torch.tanh(y / softcap) if softcap else y


def _divergence(x: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL `[n]` and its derivative by `x` `[n, V]`."""
    log_q, log_p = x.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).where(p > 0, 0).sum(-1), log_q.exp() - p


def _divergence_of_top(x: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The same of k + 1 events: the tokens `ids`, and all others together."""
    log_q = x.log_softmax(-1)
    top = log_q.gather(1, ids)
    others = log_q.scatter(1, ids, float("-inf"))
    log_q_rest = others.logsumexp(-1)
    p = log_p.exp()
    p_rest = 1 - p.sum(-1)
    p_rest = p_rest.where(p_rest > LEAST_REST, 0)
    value = (p * (log_p - top)).where(p > 0, 0).sum(-1)
    value += (p_rest * (p_rest.log() - log_q_rest)).where(p_rest > 0, 0)
    # q_j - p_rest * (q_j's share of the rest) outside the top, q_j - p_j inside.
    share = (others - log_q_rest[:, None]).exp().where(p_rest[:, None] > 0, 0)
    d = others.exp() - p_rest[:, None] * share
    return value, d.scatter(1, ids, top.exp() - p)
