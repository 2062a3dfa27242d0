"""Eight bits a number: the bound on the error, for numbers of any size, and what the newest tokens keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.caches import Int8Cache
from attnzoo.caches.quantization import Int8Storage
from tests.caches.kinds import assert_within_half_a_step, new_tokens


def there_and_back(x: Tensor, symmetric: bool) -> Tensor:
    """Through the memory of a cache of one block: `[..., D]`."""
    storage = Int8Storage(1, 1, 1, x.shape[-1], torch.float64, symmetric=symmetric)
    return storage.decode(storage.encode(x))


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 40),
    power=st.integers(-30, 30),
    shift=st.sampled_from([0.0, 1.0, -3.0, 100.0]),
    special=st.sampled_from(["", "zeros", "constant", "outlier", "halves"]),
    seed=st.integers(0, 1000),
)
def test_no_number_is_off_by_more_than_half_a_step(
    symmetric: bool, size: int, power: int, shift: float, special: str, seed: int
) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift
    if special == "zeros":
        x = torch.zeros_like(x)
    elif special == "constant":
        x = x[..., :1].expand_as(x)
    elif special == "outlier":
        x[..., 0] = 1e4
    elif special == "halves":  # every number half way between two codes, but for the largest
        x = torch.arange(size, dtype=torch.float64).sub(size // 2).add(0.5).expand(3, size).contiguous()
        x[..., 0] = 127
    x = x * 10.0**power
    got = there_and_back(x, symmetric)
    scales = Int8Storage(1, 1, 1, size, torch.float64, symmetric=symmetric).encode(x)[1]
    assert (scales > 0).all() and scales.isfinite().all()
    assert_within_half_a_step(got, x, symmetric)
    if special in ("zeros", "constant") and not symmetric:
        torch.testing.assert_close(got, x, rtol=1e-6, atol=0)


def test_an_offset_helps_where_numbers_lie_to_one_side() -> None:
    x = torch.randn(50, 64, dtype=torch.float64) + 8
    errors = [(there_and_back(x, symmetric) - x).abs().mean() for symmetric in (True, False)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_view_is_in_the_dtype_of_what_came_and_its_newest_tokens_are_exact(
    dtype: torch.dtype, symmetric: bool
) -> None:
    cache = Int8Cache(3, 2, 40, 4, 3, symmetric=symmetric, residual=6, dtype=dtype)
    k, v = new_tokens(3, 30, dtype=dtype)
    cache.append(k[:, :, :25], v[:, :, :25], torch.tensor([25, 4, 20]))
    cache.append(k[:, :, 25:], v[:, :, 25:])
    for view, given_ in zip(cache.view(), (k, v), strict=True):
        assert view.dtype == dtype
        for row, length in enumerate((25, 4, 20)):
            whole = torch.cat([given_[row, :, :length], given_[row, :, 25:]], dim=1)
            got, end = view[row, :, : length + 5], length + 5
            assert torch.equal(got[:, end - 6 :], whole[:, end - 6 :])
            rounding = torch.finfo(dtype).eps * whole.abs().amax().double()
            step = there_and_back(whole.double(), symmetric)
            assert ((got.double() - step).abs() <= rounding).logical_or(got == whole).all()


def test_after_a_crop_fewer_tokens_are_exact_and_all_are_there() -> None:
    cache, (k, v) = Int8Cache(1, 2, 40, 4, 3, residual=6, dtype=torch.float64), new_tokens(1, 30)
    cache.append(k, v)
    cache.crop(26)
    exact = (cache.view()[0] == k[:, :, :26]).all(-1).all(1)[0]
    assert exact[24:].all() and not exact[:24].all()
    assert_within_half_a_step(cache.view()[0], k[:, :, :26], True)
