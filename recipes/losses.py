"""Losses of a language model's head that never hold `[T, V]`: logits are made, used and dropped chunk by chunk.

The gradients of the hidden states and of the head are made in the forward, as long as a chunk's logits are there (cut
cross-entropy, arXiv 2411.09009; Liger kernel, arXiv 2410.10989); the backward only scales them. The matmuls run in the
autocast's dtype, softmax and sums in fp32, and the head's gradient adds up in fp32 over all chunks.

The logits of a head are `softcap * tanh(z / softcap)` with z = logit_scale * (hidden @ weight.T + bias), or z itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from recipes.losses_op import linear_loss

IGNORED = -100  # a target that does not count


class FullTeacher(NamedTuple):
    """A teacher's last hidden states and its head, of the student's vocabulary; no gradient goes there."""

    hidden: Tensor  # [T, D'], any floating dtype
    weight: Tensor  # [V, D']
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


class TopTeacher(NamedTuple):
    """The k most probable tokens of a teacher; all others count as one event, which has the rest of the probability.

    So the divergence is that of k + 1 events, a lower bound of the full one.
    """

    ids: Tensor  # [T, k] integers, distinct in a row
    logprobs: Tensor  # [T, k], natural logarithms, at the temperature of the loss


class Losses(NamedTuple):
    """fp32 scalars. Only `total` carries a gradient."""

    total: Tensor  # ce_weight * cross_entropy + kl_weight * kl
    cross_entropy: Tensor
    kl: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy in nats, summed over the targets.

    Args:
        hidden: `[T, D]`, what the head is applied to.
        weight, bias: the head, `[V, D]` and `[V]`.
        targets: int64 `[T]`; rows with IGNORED give no loss and no gradient.
        softcap, logit_scale: what the model does to its logits (Gemma 2, Cohere and Granite).
        chunk_tokens: tokens whose logits are held at once; None takes what makes them at most 1 GiB in bf16 on a GPU.
        backend: "auto", "triton" or "torch": what computes softmax and gradient of a chunk.

    Returns:
        fp32 scalar (fp64 for fp64).

    Raises:
        ValueError: for shapes and dtypes that do not fit, naming the argument.
    """
    loss, _, _ = linear_loss(
        *(hidden, weight, bias, targets, None, None),
        *(softcap, logit_scale, 1.0, 1.0, 0.0, chunk_tokens, backend),
    )
    return loss


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor | None = None,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(teacher || student) in nats, summed over rows (arXiv 1503.02531, without its factor temperature**2).

    Args:
        hidden, weight, bias, softcap, logit_scale, chunk_tokens, backend: as in `linear_cross_entropy`.
        teacher_hidden, teacher_weight: `[T, D']` and `[V, D']`, in dtypes of their own; with the other teacher's
            arguments they are what `FullTeacher` holds.
        rows: bool `[T]`, which rows count; None for all.
        temperature: divides both models' logits.

    Returns:
        fp32 scalar (fp64 for fp64).
    """
    teacher = FullTeacher(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    loss, _, _ = linear_loss(
        *(hidden, weight, bias, None, teacher, rows),
        *(softcap, logit_scale, temperature, 0.0, 1.0, chunk_tokens, backend),
    )
    return loss


def linear_mixture(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: FullTeacher | TopTeacher,
    rows: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Losses:
    """Cross-entropy and KL(teacher || student) from one set of the student's logits, with one gradient for both.

    Args:
        hidden, weight, bias, softcap, logit_scale, chunk_tokens, backend: as in `linear_cross_entropy`.
        targets: int64 `[T]`, of the cross-entropy.
        teacher: what the divergence is taken from.
        rows: bool `[T]`, which rows the divergence counts; None for those that have a target.
        ce_weight, kl_weight: of the sum that carries the gradient.
        temperature: divides both models' logits in the divergence alone.
    """
    rows = targets != IGNORED if rows is None else rows
    total, cross_entropy, kl = linear_loss(
        *(hidden, weight, bias, targets, teacher, rows),
        *(softcap, logit_scale, temperature, ce_weight, kl_weight, chunk_tokens, backend),
    )
    return Losses(total, cross_entropy.detach(), kl.detach())
