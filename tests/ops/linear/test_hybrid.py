"""Softmax near, linear far, one normaliser: against LoLCATs' equation query by query, and its ends."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal
from tests.ops.naive_linear import MAPS, near_and_far
from tests.support.compare import assert_as_accurate

BACKENDS = ["reference", "blocked"]


def draw(q_heads: int, k_heads: int, length: int, dim: int = 5, batch: int = 2) -> list[Tensor]:
    """Random q, k and v in fp64 that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((q_heads, length, dim), (k_heads, length, dim), (k_heads, length, 4))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return list(torch.autograd.grad(out, inputs, weights, retain_graph=True))


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("length", "window"), [(71, 1), (71, 7), (71, 33), (13, 13), (5, 100), (1, 1)])
def test_it_is_the_paper_s_equation(backend: str, heads: tuple[int, int], length: int, window: int) -> None:
    q, k, v = draw(*heads, length)
    gain = torch.rand(heads[0], dtype=torch.float64).add(0.1).requires_grad_()
    out = ops.hybrid_attention(q, k, v, window=window, near_weight=gain, backend=backend)
    features = [MAPS["elu"](t) for t in (q, k)]
    rows = zip(q, k, v, *features, strict=True)
    want = torch.stack([near_and_far(*row, window, gain) for row in rows])
    close(out, want)
    close(gradients(out, [q, k, v, gain]), gradients(want, [q, k, v, gain]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_may_be_given_and_of_another_size(backend: str) -> None:
    q, k, v = draw(4, 2, 40)
    weight = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    f_q, f_k = (q @ weight).softmax(-1), (k @ weight).softmax(-1)
    out = ops.hybrid_attention(
        q, k, v, window=6, q_features=f_q, k_features=f_k, feature_map="identity", backend=backend
    )
    want = torch.stack([near_and_far(*row, 6) for row in zip(q, k, v, f_q, f_k, strict=True)])
    close(out, want)
    close(gradients(out, [q, k, v, weight]), gradients(want, [q, k, v, weight]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_is_softmax_attention(backend: str) -> None:
    q, k, v = draw(6, 2, 37)
    close(ops.hybrid_attention(q, k, v, window=37, backend=backend), ops.attention(q, k, v, mask=Causal()))
    scaled = ops.hybrid_attention(q, k, v, window=50, scale=0.7, backend=backend)
    close(scaled, ops.attention(q, k, v, mask=Causal(), scale=0.7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [2, 40])
def test_packed_documents_equal_a_loop_over_documents(backend: str, window: int) -> None:
    q, k, v = draw(4, 2, 80, batch=1)
    ends = [0, 3, 3, 60, 77]
    out = ops.hybrid_attention(q, k, v, window=window, cu_seqlens=torch.tensor(ends), backend=backend)
    loop = [
        ops.hybrid_attention(*(t[:, :, a:b] for t in (q, k, v)), window=window, backend="reference")
        for a, b in pairwise(ends)
    ]
    want = torch.cat([*loop, torch.zeros(1, 4, 3, 4, dtype=torch.float64)], dim=2)
    close(out, want)
    close(gradients(out, [q, k, v]), gradients(want, [q, k, v]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["padded", "packed"])
@pytest.mark.parametrize("poison", [math.nan, 1e30])
def test_what_stands_in_padding_never_leaks(backend: str, case: str, poison: float) -> None:
    q, k, v = draw(4, 2, 40, batch=1 if case == "packed" else 2)
    options: dict[str, Any] = {"key_lengths": torch.tensor([35, 0])}
    if case == "packed":
        options = {"cu_seqlens": torch.tensor([0, 6, 35])}
    clean = ops.hybrid_attention(q, k, v, window=4, **options, backend=backend)
    assert (clean[0, :, 35:] == 0).all() and (case == "packed" or (clean[1] == 0).all())
    dirty = [t.detach().clone() for t in (q, k, v)]
    for t in dirty:
        t[0, :, 35:] = poison
        t[1:] = poison
    dirty = [t.requires_grad_() for t in dirty]
    out = ops.hybrid_attention(*dirty, window=4, **options, backend=backend)
    assert torch.equal(out, clean)
    close(gradients(out, dirty), gradients(clean, [q, k, v]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype) for t in draw(4, 2, 67, dim=16))
    truth = ops.hybrid_attention(*(t.double() for t in (q, k, v)), window=9, backend="reference")
    age = torch.arange(67)[:, None] - torch.arange(67)
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ wide_k.mT / 4).masked_fill((age < 0) | (age >= 9), -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights + (MAPS["elu"](q) @ MAPS["elu"](wide_k).mT) * (age >= 9)
    plain = weights / weights.sum(-1, keepdim=True) @ wide_v
    assert_as_accurate("out", ops.hybrid_attention(q, k, v, window=9), plain, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_passes(backend: str) -> None:
    q, k, v = draw(2, 1, 9, dim=2, batch=1)
    gain = torch.tensor([0.3, 1.5], dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, gain: Tensor) -> Tensor:
        lengths = torch.tensor([8])
        return ops.hybrid_attention(q, k, v, window=3, near_weight=gain, key_lengths=lengths, backend=backend)

    assert torch.autograd.gradcheck(run, (q, k, v, gain), fast_mode=True)


@pytest.mark.parametrize("options", [{"key_lengths": [30]}, {"cu_seqlens": [0, 9, 38]}], ids=str)
def test_compiles_without_a_graph_break(options: dict[str, list[int]]) -> None:
    q, k, v = draw(4, 2, 40, batch=1)
    given = {name: torch.tensor(value) for name, value in options.items()}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.hybrid_attention(q, k, v, window=5, **given)

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    close(got, want)
    close(gradients(got, [q, k, v]), gradients(want, [q, k, v]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": True}, "window must be an integer"),
        ({"near_weight": torch.ones(2)}, r"near_weight must be \[4\], got \[2\]"),
        ({"q_features": torch.ones(2, 4, 6, 3)}, r"q must be \[B, Hq, Sq, D\]"),
        ({"feature_map": "favor"}, "feature_map must be one of"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"key_lengths": torch.tensor([7, 1])}, r"key_lengths must be in \[0, 6\]"),
        ({"backend": "chunked"}, "backend must be 'auto', 'triton', 'blocked' or 'reference', got 'chunked'"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    q, kv = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8)
    with pytest.raises(ValueError, match=message):
        ops.hybrid_attention(q, kv, kv, **{"window": 3, **change})
