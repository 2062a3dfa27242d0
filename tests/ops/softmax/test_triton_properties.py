"""What must hold of the fused kernels whatever the numbers: one way to ask for a thing equals another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Documents, Full, GlobalTokens, Mask, PerHead, SlidingWindow
from tests.support.attention import DEVICE, DTYPES, ON_GPU, Case, assert_matches

pytest.importorskip("triton")


def run(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, logsumexp and the gradients of q, k and v under a fixed weighting."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, lse = ops.attention(*inputs, **options, return_lse=True, backend="triton")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out)
    grads = torch.autograd.grad(
        (out, lse), inputs, (weights, weights[..., 0].float().masked_fill(lse == -torch.inf, 0))
    )
    return [out, lse, *grads]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(4), GlobalTokens(1) | Dilated(2, 2)])
def test_packed_documents_equal_a_loop_over_documents(mask: Mask) -> None:
    torch.manual_seed(0)
    ends = [0, 5, 5, 30, 37]
    inputs = [t.detach() for t in Case("", batch=1).draw(torch.float32)]
    parts = [[t[:, :, a:b] for t in inputs] for a, b in pairwise(ends)]
    inputs = [t.requires_grad_() for t in inputs]
    packed = ops.attention(*inputs, mask=mask, cu_seqlens_q=torch.tensor(ends, device=DEVICE), backend="triton")
    parts = [[t.requires_grad_() for t in part] for part in parts]
    each = [ops.attention(*part, mask=mask, backend="triton") for part in parts]
    assert_same([packed], [torch.cat(each, 2)])
    weights = torch.randn_like(packed)
    grads = [torch.autograd.grad(o, p, w) for o, p, w in zip(each, parts, weights.split([5, 0, 25, 7], 2), strict=True)]
    whole = torch.autograd.grad(packed, inputs, weights)
    assert_same(list(whole), [torch.cat(g, 2) for g in zip(*grads, strict=True)])


@pytest.mark.parametrize("group", [3, 8])
def test_grouped_heads_equal_repeated_keys(group: int) -> None:
    torch.manual_seed(1)
    q, k, v = Case("", heads=(2 * group, 2), lengths=(19, 19), batch=1).draw(torch.float32)
    repeated = [q, *(t.repeat_interleave(group, 1) for t in (k, v))]
    out, lse, d_q, d_k, d_v = run(repeated, mask=Causal())
    summed = [t.unflatten(1, (2, group)).sum(2) for t in (d_k, d_v)]
    assert_same(run([q, k, v], mask=Causal()), [out, lse, d_q, *summed])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SlidingWindow(37, ahead=5), SlidingWindow(1 << 40, ahead=5)),
        (SlidingWindow(37), Causal()),
        (Dilated(5, 1, ahead=2), SlidingWindow(5, ahead=2)),
        (SlidingWindow(1 << 40, ahead=1 << 40), Full()),
        (Documents([0, 37]), Full()),
        (Documents([0, 37]) & Causal(), Causal()),
        (PerHead([SlidingWindow(4)] * 2), SlidingWindow(4)),
        (SlidingWindow(4) | SlidingWindow(9), SlidingWindow(9)),
    ],
    ids=str,
)
def test_masks_that_show_the_same_give_the_same(one: Mask, other: Mask) -> None:
    torch.manual_seed(2)
    inputs = Case("", batch=1).draw(torch.float32)
    assert_same(run(inputs, mask=one), run(inputs, mask=other))


def test_a_dense_mask_equals_its_pattern() -> None:
    torch.manual_seed(3)
    inputs = Case("", lengths=(19, 37), batch=1).draw(torch.float32)
    for mask in (Causal(), SlidingWindow(5, ahead=3)):
        assert_same(run(inputs, mask=mask), run(inputs, mask=mask.dense(19, 37, device=DEVICE)))


def test_a_permuted_batch_gives_a_permuted_output_to_the_bit() -> None:
    torch.manual_seed(4)
    inputs = [t.detach() for t in Case("", batch=3).draw(DTYPES[-1])]
    lengths, order = torch.tensor([37, 8, 20], device=DEVICE), [2, 0, 1]
    one, other = (
        ops.attention(*(t[rows] for t in inputs), key_lengths=lengths[rows], backend="triton")
        for rows in ([0, 1, 2], order)
    )
    assert torch.equal(one[order], other)


def test_padding_equals_a_shorter_call() -> None:
    torch.manual_seed(5)
    q, k, v = (t.detach() for t in Case("", batch=1).draw(torch.float32))
    padded = ops.attention(q, k, v, key_lengths=torch.tensor([20], device=DEVICE), backend="triton")
    torch.testing.assert_close(padded, ops.attention(q, k[:, :, :20], v[:, :, :20], backend="triton"))


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(9) | GlobalTokens(2)])
def test_a_deterministic_backward_gives_equal_bits(mask: Mask) -> None:
    torch.manual_seed(6)
    long = (1021, 1021) if ON_GPU else (37, 37)
    inputs = Case("", heads=(6, 2), lengths=long, batch=1).draw(DTYPES[-1])
    bias = torch.randn(long[0], long[1], device=DEVICE, requires_grad=True)
    found = []
    for _ in range(4 if ON_GPU else 2):
        out = ops.attention(*inputs, mask=mask, bias=bias, deterministic=True, backend="triton")
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out)
        found.append(torch.autograd.grad(out, [*inputs, bias], weights))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


SINGLE = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(SlidingWindow, st.integers(1, 20), st.integers(0, 9)),
    st.builds(Dilated, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2)),
    st.builds(GlobalTokens, st.integers(1, 5)),
    st.lists(st.integers(0, 25), min_size=2, max_size=4).map(lambda cuts: Documents([0, *sorted(cuts)])),
)
PAIRS = st.builds(lambda a, b, both: a & b if both else a | b, SINGLE, SINGLE, st.booleans())


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, torch.dtype]:
    k_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, each = k_heads * group, (draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    mask = draw(st.one_of(SINGLE, PAIRS, st.lists(SINGLE, min_size=heads, max_size=heads).map(PerHead)))
    kind = draw(st.sampled_from(["plain", "padding", "packed"]))
    batch = 1 if kind == "packed" else draw(st.integers(1, 2))
    options: dict[str, Any] = {}
    if kind == "padding":
        options["key_lengths"] = torch.tensor(draw(st.lists(st.integers(0, each[1]), min_size=batch, max_size=batch)))
    if kind == "packed":
        for name, length in zip(("cu_seqlens_q", "cu_seqlens_k"), each, strict=True):
            cuts = draw(st.lists(st.integers(0, length), min_size=2, max_size=2))
            options[name] = torch.tensor([0, *sorted(cuts)])
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.5, 20.0]))
    if draw(st.booleans()):
        options["sinks"] = torch.linspace(-1, 1, heads)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.linspace(0.1, 0.8, heads)
    if kind != "packed" and draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, *each)]
        options["bias"] = torch.linspace(-2, 2, shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape)
    dims = (draw(st.sampled_from([1, 8, 16, 24])), draw(st.sampled_from([8, 16, 20])))
    case = Case("drawn", (heads, k_heads), each, dims, batch, mask, options, d_lse=8.0)
    return case, draw(st.sampled_from(DTYPES))


@settings(
    max_examples=200 if ON_GPU else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(calls())
@example((Case("mixed", (3, 1), (24, 5), (24, 20), 2, Causal(), {"softcap": 1.5, "sinks": torch.zeros(3)}), DTYPES[-1]))
def test_any_mixture_of_options_is_as_accurate_as_plain_pytorch(call: tuple[Case, torch.dtype]) -> None:
    torch.manual_seed(7)
    case, dtype = call
    assert_matches(case.draw(dtype), case.settings(), lse_weight=case.d_lse)
