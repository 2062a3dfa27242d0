"""Additive bias, its gradient, and ALiBi: the reference against a loop over queries, every other backend against it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Full, SlidingWindow, longformer
from attnzoo.ops.softmax.tiled import tiled_attention, tiled_attention_backward
from tests.support.compare import assert_as_accurate

SHAPES = [(2, 2, 7, 7, 16), (6, 2, 5, 11, 9), (2, 1, 131, 137, 8), (8, 1, 1, 13, 16)]  # Hq, Hk, Sq, Sk, D
MASKS = [None, Causal(), SlidingWindow(3)]
SPREADS = ["whole", "heads", "rows", "columns", "one"]


def draw(heads, k_heads, q_len, k_len, dim, *, batch=2, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len, dim), (k_heads, k_len, dim), (k_heads, k_len, dim))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def draw_bias(spread, q: Tensor, k: Tensor, *, dtype=torch.float64) -> Tensor:
    batch, heads, q_len = q.shape[:3]
    shape = {
        "whole": (batch, heads, q_len, k.shape[2]),
        "heads": (heads, q_len, k.shape[2]),
        "rows": (batch, 1, 1, k.shape[2]),
        "columns": (1, heads, q_len, 1),
        "one": (),
    }[spread]
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(dtype).requires_grad_()


def slopes_of(heads: int, batch: int | None = None) -> Tensor:
    one = 2.0 ** -torch.linspace(0.5, 4, heads)
    return one if batch is None else torch.stack([one * (b + 1) for b in range(batch)])


def query_by_query(q, k, v, visible, added, softcap=None, sinks=None) -> tuple[Tensor, Tensor]:
    """Attention written a second time, one query at a time over the keys that it sees."""
    rows, logs = [], []
    added = added.expand(*q.shape[:3], k.shape[2])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).reshape(-1, 3).tolist():
        seen = (visible[b, h, i] & (added[b, h, i] > -math.inf)).nonzero().squeeze(1)
        keys, values = (t[b, h // (q.shape[1] // k.shape[1])][seen] for t in (k, v))
        s = keys @ q[b, h, i] * q.shape[-1] ** -0.5
        s = (softcap * torch.tanh(s / softcap) if softcap else s) + added[b, h, i][seen]
        s = s if sinks is None else torch.cat([s, sinks[h, None]])
        none = len(seen) == 0
        logs.append(torch.tensor(-math.inf, dtype=q.dtype) if none else torch.logsumexp(s, 0))
        rows.append(q.new_zeros(v.shape[-1]) if none else torch.softmax(s, 0)[: len(seen)] @ values)
    return torch.stack(rows).reshape(*q.shape[:3], -1), torch.stack(logs).reshape(q.shape[:3])


def gradients(out: Tensor, inputs: list[Tensor], lse: Tensor | None = None) -> tuple[Tensor, ...]:
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
    if lse is not None and lse.isfinite().any():
        loss = loss + (lse[lse.isfinite()] ** 2).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("shape", "spread", "mask"),
    [(shape, *case) for shape in (SHAPES[0], SHAPES[1], SHAPES[3]) for case in product(SPREADS, MASKS)]
    + [(SHAPES[2], "whole", Causal()), (SHAPES[2], "rows", SlidingWindow(3))],
)
def test_a_bias_and_its_gradient_match_a_loop_over_queries(backend, shape, spread, mask) -> None:
    q, k, v = draw(*shape)
    bias = draw_bias(spread, q, k)
    extra = shape[0] == 6  # softcap, sinks and padding with it
    sinks = torch.linspace(-1, 2, shape[0], dtype=torch.float64).requires_grad_() if extra else None
    lengths = torch.tensor([shape[3] - 1, 0]) if extra else None
    visible = (mask or Full()).dense(shape[2], shape[3]).expand(2, shape[0], -1, -1)
    if lengths is not None:
        visible = visible & (torch.arange(shape[3]) < lengths[:, None])[:, None, None]
    options = {"softcap": 3.0 if extra else None, "sinks": sinks}
    inputs = [q, k, v, bias] if sinks is None else [q, k, v, bias, sinks]
    want = query_by_query(q, k, v, visible, bias, **options)
    got = ops.attention(q, k, v, bias=bias, mask=mask, key_lengths=lengths, return_lse=True, backend=backend, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    found = gradients(got[0], inputs, got[1])
    assert found[3].shape == bias.shape
    torch.testing.assert_close(found, gradients(want[0], inputs, want[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("mask", [None, Causal(), SlidingWindow(4, ahead=2), Dilated(3, 2)])
def test_alibi_is_a_bias_of_distances_aligned_bottom_right(backend, per_batch, mask) -> None:
    for shape in SHAPES:
        q, k, v = draw(*shape)
        slopes = slopes_of(shape[0], 2 if per_batch else None)
        i = torch.arange(shape[3] - shape[2], shape[3])
        distance = (i[:, None] - torch.arange(shape[3])).abs()
        bias = -slopes.double().reshape(-1, shape[0], 1, 1) * distance
        got = ops.attention(q, k, v, alibi_slopes=slopes, mask=mask, backend=backend)
        want = ops.attention(q, k, v, bias=bias, mask=mask, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(got, [q, k, v]), gradients(want, [q, k, v]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_alibi_counts_inside_each_packed_document(backend) -> None:
    q, k, v = draw(4, 2, 150, 160, 8, batch=1)
    cu_q, cu_k = torch.tensor([0, 3, 3, 140, 145]), torch.tensor([0, 2, 6, 145, 145])
    options = {"alibi_slopes": slopes_of(4), "mask": Causal()}
    packed = ops.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend, **options)
    parts = [
        ops.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], backend="reference", **options)
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    loop = torch.cat([*parts, torch.zeros(1, 4, 5, 8, dtype=torch.float64)], dim=2)
    torch.testing.assert_close(packed, loop)
    torch.testing.assert_close(gradients(packed, [q, k, v]), gradients(loop, [q, k, v]))


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_minus_infinity_in_a_bias_hides_a_key_as_a_mask_does(backend) -> None:
    q, k, v = draw(4, 2, 6, 9, 8)
    visible = torch.rand(4, 6, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[1, 2] = False
    bias = torch.zeros(4, 6, 9, dtype=torch.float64).masked_fill(~visible, -math.inf)
    got = ops.attention(q, k, v, bias=bias, backend=backend)
    want = ops.attention(q, k, v, mask=visible, backend="reference")
    torch.testing.assert_close(got, want)
    assert (got[:, 1, 2] == 0).all()
    torch.testing.assert_close(gradients(got, [q, k, v]), gradients(want, [q, k, v]))
    if backend != "sdpa":
        bias.requires_grad_()
        out, lse = ops.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        (found,) = gradients(out, [bias], lse)
        assert (found[~visible] == 0).all() and found.isfinite().all() and (lse[:, 1, 2] == -math.inf).all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("spread", SPREADS)
def test_gradcheck_passes_with_a_bias(backend, spread) -> None:
    q, k, v = draw(4, 2, 3, 4, 3, batch=1)
    bias = draw_bias(spread, q, k)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        options = {"softcap": 2.0, "alibi_slopes": slopes_of(4), "mask": SlidingWindow(3)}
        return ops.attention(q, k, v, bias=bias, backend=backend, **options)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 3, 67, 67, 64)])
@pytest.mark.parametrize("spread", ["whole", "heads", "rows"])
@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_error_with_a_bias_is_at_most_twice_that_of_plain_pytorch(backend, shape, spread, dtype) -> None:
    q, k, v = draw(*shape, dtype=dtype)
    bias = draw_bias(spread, q, k, dtype=dtype).requires_grad_(backend == "tiled")
    inputs = [q, k, v, bias] if backend == "tiled" else [q, k, v]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (q, k, v, bias)]
    truth = ops.attention(*exact[:3], bias=exact[3], backend="reference")
    got = ops.attention(q, k, v, bias=bias, backend=backend)
    own = [t.detach().requires_grad_(t.requires_grad) for t in (q, k, v, bias)]
    keys, values = (t.repeat_interleave(shape[0] // shape[1], 1) for t in own[1:3])
    plain = torch.softmax(own[0] @ keys.mT * shape[4] ** -0.5 + own[3], -1) @ values
    assert_as_accurate("out", got, plain, truth)
    weights = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).reshape(truth.shape)
    grads = [
        torch.autograd.grad(o, i, weights.to(o.dtype))
        for o, i in ((got, inputs), (plain, own[: len(inputs)]), (truth, exact[: len(inputs)]))
    ]
    for name, *one in zip(("dq", "dk", "dv", "dbias"), *grads, strict=False):
        assert_as_accurate(name, *one)


def test_sdpa_refuses_what_would_be_quadratic_or_another_function() -> None:
    q, k, v = draw(4, 2, 6, 6, 8, dtype=torch.float32)
    bias = draw_bias("whole", q, k, dtype=torch.float32)
    for options, why in (
        ({"bias": bias}, "has no fused gradient of a bias on a CPU"),
        ({"bias": bias.detach().double()}, "wants a bias of the inputs' dtype"),
        ({"bias": bias.detach(), "mask": Causal()}, "cannot join a bias with a mask"),
        ({"bias": bias.detach(), "key_lengths": torch.tensor([3, 6])}, "cannot join a bias with a mask"),
        ({"alibi_slopes": slopes_of(4)}, "has no ALiBi"),
    ):
        with pytest.raises(ValueError, match=f"sdpa: .*{why}"):
            ops.attention(q, k, v, backend="sdpa", **options)
    assert "sdpa: runs" in ops.explain(q, k, v, bias=bias.detach())


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": ones(5, 5)}, r"bias must be floating point and broadcast to \[1, 4, 5, 6\], got \[5, 5\]"),
        ({"bias": ones(1, 1, 1, 5, 6)}, "bias must be floating point and broadcast to"),
        ({"bias": ones(5, 6, dtype=torch.bool)}, "bias must be floating point .* got .* torch.bool"),
        ({"bias": ones(5, 6), "cu_seqlens_q": torch.tensor([0, 5])}, "bias has no meaning for packed sequences"),
        ({"bias": ones(5, 6).to("meta")}, "bias must be on the device of q, cpu, got meta"),
        ({"alibi_slopes": ones(3)}, r"alibi_slopes must be \[4\] or \[1, 4\] floating point, got \[3\]"),
        ({"alibi_slopes": ones(4, dtype=torch.int64)}, "alibi_slopes must be .* floating point, got .* torch.int64"),
        ({"alibi_slopes": ones(4).requires_grad_()}, "alibi_slopes must not require a gradient"),
        ({"alibi_slopes": ones(4).to("meta")}, "alibi_slopes must be on the device of q"),
    ],
)
def test_bad_bias_and_slopes_are_refused_by_name(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(ones(1, 4, 5, 8), ones(1, 2, 6, 8), ones(1, 2, 6, 8), **change)


def test_tiled_operators_pass_opcheck_with_a_bias() -> None:
    q, k, v = draw(4, 2, 6, 7, 8, batch=1)
    bias = draw_bias("columns", q, k)
    none = [None] * 6
    for mask, slopes in ((Causal(), None), (SlidingWindow(3), slopes_of(4)[None])):
        arguments = (q, k, v, *none, mask.text, 0.3, 2.0, 0.0, bias, slopes)
        torch.library.opcheck(tiled_attention, arguments)


@pytest.mark.parametrize("backend", ["tiled", "reference", "sdpa"])
def test_compiles_with_a_bias_and_alibi_without_a_graph_break(backend) -> None:
    q, k, v = draw(4, 2, 9, 9, 8, dtype=torch.float32)
    bias = draw_bias("heads", q, k, dtype=torch.float32).requires_grad_(backend != "sdpa")
    slopes = None if backend == "sdpa" else slopes_of(4)
    inputs = [q, k, v] if backend == "sdpa" else [q, k, v, bias]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.attention(q, k, v, bias=bias, alibi_slopes=slopes, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, bias), run(q, k, v, bias))
    torch.testing.assert_close(
        gradients(compiled(q, k, v, bias), inputs), gradients(run(q, k, v, bias), inputs), rtol=1e-5, atol=1e-5
    )


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.size = max(self.size, t.untyped_storage().nbytes() if isinstance(t, Tensor) else 0)
        return out


def test_tiled_memory_with_a_broadcast_bias_and_alibi_is_linear_in_length() -> None:
    sizes = []
    for length in (1024, 4096):
        q, k, v = (torch.randn(1, h, length, 16) for h in (2, 1, 1))
        rest = (*[None] * 6, SlidingWindow(100).text, 0.25, 0.0, 0.0, torch.randn(1, 2, 1, length), slopes_of(2)[None])
        with Largest() as largest:
            out, lse = tiled_attention._init_fn(q, k, v, *rest)
            tiled_attention_backward._init_fn(torch.ones_like(out), torch.zeros_like(lse), q, k, v, *rest, True)
        sizes.append(largest.size)
    assert sizes[1] <= 4.1 * sizes[0]


@pytest.mark.parametrize(
    ("backend", "mask"),
    [("sdpa", Causal()), *product(["tiled", "reference"], [Causal(), longformer(6, 2)])],
)
def test_a_deterministic_backward_gives_equal_bits(backend, mask) -> None:
    q, k, v = draw(6, 2, 150, 150, 16, dtype=torch.float32)
    found = []
    for _ in range(3):
        out = ops.attention(q, k, v, mask=mask, deterministic=True, backend=backend)
        found.append([out, *gradients(out, [q, k, v])])
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
