"""When a fast result is as right as its dtype allows."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(name: str, got: Tensor, plain: Tensor, truth: Tensor, *, slack: float = 1.0) -> None:
    """`got` may err at most twice as much as plain PyTorch in the same dtype does, against the fp64 truth.

    Compared are the maximum, the mean and the worst row (the last dimension is a row), with a floor of four eps of the
    largest value, below which an error is rounding.

    Args:
        name: what is compared, for the message.
        got, plain: the tested result and plain PyTorch's, of one shape and dtype.
        truth: the fp64 result.
        slack: multiplies what is allowed; 1 for every kernel of ours.
    """
    assert got.shape == truth.shape and got.dtype == plain.dtype, (name, got.shape, truth.shape, got.dtype)
    assert not torch.isnan(got).any(), f"{name}: NaN at {torch.isnan(got).nonzero()[0].tolist()}"
    if truth.numel() == 0:
        return
    floor = 4 * torch.finfo(plain.dtype).eps * truth.abs().max().item()
    ours, theirs = (got.double() - truth).abs(), (plain.double() - truth).abs()
    worst = torch.unravel_index(ours.argmax(), ours.shape)
    for what, a, b in (
        ("maximum", ours.max(), theirs.max()),
        ("mean", ours.mean(), theirs.mean()),
        ("worst row", ours.mean(-1).max(), theirs.mean(-1).max()),
    ):
        where = [int(w) for w in worst]
        assert a <= slack * (2 * b + floor), (
            f"{name}: {what} error {a:.2e} against {b:.2e}, floor {floor:.2e}; worst at {where}"
        )
