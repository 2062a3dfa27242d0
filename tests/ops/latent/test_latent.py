"""`latent_decode` against the paper's formula, over caches whose dead parts hold NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.caches import Cache, ContiguousCache, LatentCache
from attnzoo.masks import Causal, Documents, Full, SlidingWindow
from attnzoo.ops import attention, explain_latent_decode, latent_decode
from attnzoo.ops.latent.reference import latent_decode_reference

RANK, ROPE, SCALE = 6, 4, 0.4


def filled(counts: list[int], rank: int = RANK, joint: bool = True, dtype: torch.dtype = torch.float64) -> Cache:
    """A cache of `counts` tokens a row, with NaN behind each row's end."""
    batch, room = len(counts), max(counts) + 3
    made = LatentCache(batch, room, rank, ROPE, dtype=dtype)
    cache: Cache = made if joint else ContiguousCache(batch, 1, room, rank, ROPE, dtype=dtype)
    cache.append(*(torch.full((batch, 1, room, size), torch.nan, dtype=dtype) for size in (rank, ROPE)))
    cache.reset()
    new = [torch.randn(batch, 1, max(counts), size, dtype=dtype) for size in (rank, ROPE)]
    dead = (torch.arange(max(counts)) >= torch.tensor(counts)[:, None])[:, None, :, None]
    cache.append(*(part.masked_fill(dead, torch.nan) for part in new), torch.tensor(counts))
    return cache


def queries(batch: int, heads: int, q_len: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, heads, q_len, size, dtype=torch.float64) for size in (rank, ROPE))


MASKS = [None, Full(), Causal(), SlidingWindow(1), SlidingWindow(4), SlidingWindow(3) | SlidingWindow(9) & Causal()]


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    q_len=st.sampled_from([1, 2, 5, 17]),
    padding=st.lists(st.integers(0, 17), min_size=3, max_size=3),
    even=st.booleans(),
    mask=st.sampled_from(MASKS),
    heads=st.sampled_from([1, 3, 16]),
    joint=st.booleans(),
)
def test_latent_decode_is_the_formula_for_rows_of_any_lengths(
    before: list[int], q_len: int, padding: list[int], even: bool, mask: Any, heads: int, joint: bool
) -> None:
    starts = [before[0]] * len(before) if even else before
    counts = [start + max(q_len - pad, 0) for start, pad in zip(starts, padding, strict=False)]
    cache, q = filled(counts, joint=joint), queries(len(counts), heads, q_len)
    expected = latent_decode_reference(*q, *cache.view(), counts, starts, scale=SCALE, mask=mask or Full())
    out = latent_decode(*q, cache, scale=SCALE, mask=mask, starts=starts[0] if even else torch.tensor(starts))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [[9, 9], [9, 4]])
@pytest.mark.parametrize("q_len", [1, 3])
def test_queries_stand_at_the_end_of_their_rows_unless_told(counts: list[int], q_len: int) -> None:
    cache, q = filled(counts), queries(2, 3, q_len)
    starts = [count - q_len for count in counts]
    expected = latent_decode_reference(*q, *cache.view(), counts, starts, scale=SCALE, mask=Causal())
    torch.testing.assert_close(latent_decode(*q, cache, scale=SCALE, mask=Causal()), expected, rtol=0, atol=1e-12)


def test_it_is_attention_with_one_wide_head_whose_values_are_the_front_of_its_keys() -> None:
    cache, (q_latent, q_rope) = filled([8, 8]), queries(2, 4, 3)
    latent, rope_key = cache.view()
    q, k = torch.cat([q_latent, q_rope], -1), torch.cat([latent, rope_key], -1)
    expected = attention(q, k, latent, mask=Causal(), scale=SCALE, backend="reference")
    out = latent_decode(q_latent, q_rope, cache, scale=SCALE, mask=Causal())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_queries_that_see_no_token_give_zero() -> None:
    for counts in ([0, 0], [0, 3]):
        out = latent_decode(*queries(2, 4, 1), filled(counts), scale=SCALE, starts=torch.tensor(counts) - 1)
        assert not out[0].any() and bool(out[1].any()) == (counts[1] > 0)
    out = latent_decode(*queries(2, 4, 1), filled([4, 3]), scale=SCALE, mask=Documents((0, 3)))
    assert not out[0].any() and out[1].any()


def test_gradients_of_queries_are_right_in_fp64() -> None:
    cache, q = filled([7, 4]), [part.requires_grad_() for part in queries(2, 3, 2)]
    options: dict[str, Any] = {"scale": SCALE, "mask": SlidingWindow(3)}
    torch.autograd.gradcheck(lambda *q: latent_decode(*q, cache, **options), q)
    torch.autograd.gradcheck(lambda *q: latent_decode_reference(*q, *cache.view(), [7, 4], [5, 2], **options), q)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made outside of `attention`, views aside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if isinstance(made, Tensor) and not func.is_view:
                self.elements = max(self.elements, made.numel())
        return out


def test_one_step_of_many_heads_copies_no_latent() -> None:
    cache, q = filled([2048, 2048], rank=32), queries(2, 16, 1, rank=32)
    with Largest() as largest:
        latent_decode(*q, cache, scale=SCALE, mask=Causal())
    assert 0 < largest.elements <= 2 * 16 * (32 + ROPE)  # the queries and the output


@pytest.mark.parametrize("counts", [[1024, 1024], [1024, 700]])
def test_long_chunks_stay_linear_in_memory_and_repeat_no_latent(counts: list[int]) -> None:
    heads, q_len = 4, 256
    cache, q = filled(counts), queries(2, heads, q_len)
    with Largest() as largest:
        latent_decode(*q, cache, scale=SCALE, mask=Causal())
    assert 0 < largest.elements <= max(2 * heads * q_len, 2 * 1024) * (RANK + ROPE)
    assert largest.elements < q_len * 1024


@pytest.mark.parametrize(
    ("q_latent", "q_rope", "message"),
    [
        (torch.ones(3, 4, 1, RANK), torch.ones(3, 4, 1, ROPE), r"q_latent has shape \[3, 4, 1, 6\]"),
        (torch.ones(2, 4, 1, RANK + 1), torch.ones(2, 4, 1, ROPE), r"must be \[2, heads, queries, 6\]"),
        (torch.ones(2, 4, 1, RANK), torch.ones(2, 4, 1, ROPE + 1), r"q_rope has shape \[2, 4, 1, 5\]"),
        (torch.ones(2, 4, 1, RANK), torch.ones(2, 3, 1, ROPE), r"q_rope has shape \[2, 3, 1, 4\]"),
        (torch.ones(2, 4, RANK), torch.ones(2, 4, ROPE), r"q_latent has shape \[2, 4, 6\]"),
        (torch.ones(2, 4, 2, RANK), torch.ones(2, 4, 2, ROPE), "starts holds 6"),
    ],
)
def test_queries_that_do_not_fit_the_cache_are_named(q_latent: Tensor, q_rope: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_decode(q_latent.double(), q_rope.double(), filled([5, 5]), scale=SCALE, starts=6)


def test_a_cache_of_several_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="cache holds 2 heads; latents are one head for all"):
        latent_decode(*queries(1, 4, 1), ContiguousCache(1, 2, 4, RANK, ROPE, dtype=torch.float64), scale=SCALE)


def test_explain_names_the_choice_and_every_reason() -> None:
    lines = explain_latent_decode(*queries(2, 4, 1), filled([5, 3]), scale=SCALE).splitlines()
    assert lines[0].startswith("triton: ") and "has no torch.float64" in lines[0]
    assert lines[1] == "attention: runs"
    assert lines[2].startswith("reference: ") and len(lines) == 3
