"""Hedgehog's features in PyTorch and in their kernel, which is interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.ops.linear.hedgehog import hedgehog_features, hedgehog_triton
from tests.support.compare import assert_as_accurate

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # bf16 is wrong in the interpreter


def draw(batch: int, heads: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """x, laid out as `[B, S, H, D]`, and weight, which fp16 can hold."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(batch, length, heads, dim, generator=generator).half().transpose(1, 2)
    return x.to(DEVICE), (torch.randn(heads, dim, dim, generator=generator) / dim**0.5).half().to(DEVICE)


@pytest.mark.parametrize("sizes", [(5, 3, 1, 16), (2, 2, 23, 20), (1, 1, 3, 64), (1, 2, 17, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_the_kernel_is_as_accurate_as_plain_pytorch(sizes: Any, dtype: torch.dtype) -> None:
    x, weight = draw(*sizes)
    truth = hedgehog_features(x.double(), weight.double())
    plain = hedgehog_features(x.to(dtype), weight.to(dtype), backend="plain")
    got = hedgehog_features(x.to(dtype), weight.to(dtype), backend="triton")
    assert_as_accurate("features", got, plain, truth)
    halves = truth.unflatten(-1, (2, -1))
    torch.testing.assert_close(halves.sum(-1), torch.ones_like(halves[..., 0]))
    torch.testing.assert_close(halves[..., 0, :].log() + halves[..., 1, :].log(), halves.log().sum(-2))


def test_a_token_full_of_nan_spoils_itself_alone() -> None:
    x, weight = (t.float() for t in draw(3, 2, 7, 16))
    clean = hedgehog_features(x, weight, backend="triton")
    x[1, :, 4] = torch.nan
    dirty = hedgehog_features(x, weight, backend="triton")
    assert dirty[1, :, 4].isnan().all()
    dirty[1, :, 4] = clean[1, :, 4]
    assert torch.equal(clean, dirty)


def test_the_operator_passes_opcheck_and_compiles_without_a_graph_break() -> None:
    x, weight = (t.float() for t in draw(2, 2, 5, 16))
    torch.library.opcheck(hedgehog_triton, (x, weight))
    torch._dynamo.reset()
    compiled = torch.compile(hedgehog_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, backend="triton"), hedgehog_features(x, weight))


def test_what_the_kernel_cannot_run_is_refused_with_the_reason_and_left_to_pytorch() -> None:
    x, weight = (t.float() for t in draw(2, 2, 5, 16))
    large = torch.zeros(1, 1, 1, 65, device=DEVICE)
    calls: list[tuple[Any, Any, str]] = [
        (x.double(), weight, "has no fp64"),
        (x, weight.requires_grad_(), "has no gradient"),
        (x[:, :, :0], weight.detach(), "needs a row, a head and a token"),
        (large, large.new_zeros(1, 65, 65), "takes heads of 64 at most in torch.float32, here 65"),
    ]
    for one, other, reason in calls:
        with pytest.raises(ValueError, match=reason):
            hedgehog_features(one, other, backend="triton")
        assert hedgehog_features(one, other).shape == (*one.shape[:3], 2 * one.shape[3])
    with pytest.raises(ValueError, match=r"weight \[H, D, D\], got \[2, 2, 5, 16\] and \[2, 16, 8\]"):
        hedgehog_features(x, weight[:, :, :8])
    with pytest.raises(ValueError, match="backend must be 'auto'"):
        hedgehog_features(x, weight, backend="fast")
