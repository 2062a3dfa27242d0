"""Softmax attention: the reference against a loop over queries, every other backend against the reference."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo import ops
from attnzoo.masks import Causal, Documents, Full, Mask, SlidingWindow
from attnzoo.ops.softmax.tiled import tiled_attention
from tests.support.compare import assert_as_accurate

MASKS = [None, Causal(), SlidingWindow(3), SlidingWindow(2) | Documents([0, 2, 2, 6]) & Causal()]
SHAPES = [  # Hq, Hk, Sq, Sk, D, Dv: groups of 1, 3, 8; more queries than keys and fewer; one token; two rows of tiles
    (2, 2, 7, 7, 16, 16),
    (6, 2, 5, 11, 9, 5),
    (8, 1, 11, 3, 8, 24),
    (3, 1, 1, 13, 16, 16),
    (2, 1, 131, 137, 8, 8),
]


def draw(heads, k_heads, q_len, k_len, dim, v_dim, *, batch=2, dtype=torch.float64, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, dim), (k_heads, k_len, dim), (k_heads, k_len, v_dim))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def query_by_query(q, k, v, visible, softcap=None, sinks=None) -> tuple[Tensor, Tensor]:
    """Attention written a second time, one query at a time over the keys that it sees."""
    rows, logs = [], []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).reshape(-1, 3).tolist():
        seen = visible[b, h, i].nonzero().squeeze(1)
        keys, values = (t[b, h // (q.shape[1] // k.shape[1])][seen] for t in (k, v))
        s = keys @ q[b, h, i] * q.shape[-1] ** -0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if sinks is None else torch.cat([s, sinks[h, None]])
        none = len(seen) == 0
        logs.append(torch.tensor(-math.inf, dtype=q.dtype) if none else torch.logsumexp(s, 0))
        rows.append(q.new_zeros(v.shape[-1]) if none else torch.softmax(s, 0)[: len(seen)] @ values)
    return torch.stack(rows).reshape(*q.shape[:3], -1), torch.stack(logs).reshape(q.shape[:3])


def gradients(out: Tensor, lse: Tensor | None, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output, and of the logsumexp where it is finite."""
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
    if lse is not None and lse.isfinite().any():
        loss = loss + (lse[lse.isfinite()] ** 2).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("softcap", "sink"), [(None, False), (3.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("padded", [False, True])
def test_output_logsumexp_and_gradients_match_a_loop_over_queries(backend, shape, mask, softcap, sink, padded) -> None:
    q, k, v = draw(*shape)
    sinks = torch.linspace(-1, 2, shape[0], dtype=torch.float64).requires_grad_() if sink else None
    lengths = torch.tensor([shape[3] - 1, 0]) if padded else None
    visible = (mask or Full()).dense(shape[2], shape[3]).expand(2, shape[0], -1, -1)
    if lengths is not None:
        visible = visible & (torch.arange(shape[3]) < lengths[:, None])[:, None, None]
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    want = query_by_query(q, k, v, visible, softcap, sinks)
    got = ops.attention(
        q, k, v, mask=mask, softcap=softcap, sinks=sinks, key_lengths=lengths, return_lse=True, backend=backend
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(*got, inputs), gradients(*want, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 3, 67, 67, 64, 64)])
@pytest.mark.parametrize("mask", [*MASKS, torch.rand(2, 1, 1, 1) < 2])
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, mask, shape, dtype) -> None:
    exact = draw(*shape, dtype=dtype)
    truth_inputs = [t.detach().double().requires_grad_() for t in exact]
    truth = ops.attention(*truth_inputs, mask=mask, backend="reference")
    try:
        got = ops.attention(*exact, mask=mask, backend=backend)
    except ValueError as refusal:
        assert backend == "sdpa" and "no backend can run this call\nsdpa: " in str(refusal)
        return
    group = shape[0] // shape[1]
    q, k, v = (t.detach().requires_grad_() for t in exact)
    visible = mask if isinstance(mask, Tensor) else (mask or Full()).dense(shape[2], shape[3])
    scores = (q @ k.repeat_interleave(group, 1).mT * shape[4] ** -0.5).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)
    plain = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0) @ v.repeat_interleave(group, 1)
    assert_as_accurate("out", got, plain, truth)
    weights = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).reshape(truth.shape)
    grads = [
        torch.autograd.grad(o, i, weights.to(o.dtype))
        for o, i in ((got, exact), (plain, [q, k, v]), (truth, truth_inputs))
    ]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiled_gives_a_query_and_its_only_key_no_gradient_not_even_rounding(dtype) -> None:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in draw(4, 2, 150, 150, 24, 16))
    out = ops.attention(q, k, v, mask=SlidingWindow(1), backend="tiled")
    dq, dk = torch.autograd.grad(out, (q, k), torch.randn_like(out))
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("mask", [None, Causal(), SlidingWindow(2)])
def test_packed_documents_equal_a_loop_over_documents(backend, mask) -> None:
    q, k, v = draw(4, 2, 150, 160, 8, 5, batch=1)
    cu_q, cu_k = torch.tensor([0, 3, 3, 140, 145]), torch.tensor([0, 2, 6, 145, 145])
    packed, lse = ops.attention(
        q, k, v, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend=backend
    )
    parts = [
        ops.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], mask=mask, backend="reference")
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    loop = torch.cat([*parts, torch.zeros(1, 4, 5, 5, dtype=torch.float64)], dim=2)
    torch.testing.assert_close(packed, loop)
    assert (lse[:, :, 145:] == -math.inf).all()
    torch.testing.assert_close(gradients(packed, None, [q, k, v]), gradients(loop, None, [q, k, v]))


@pytest.mark.parametrize("mask", [None, Causal()])
def test_sdpa_runs_packed_documents_that_share_their_boundaries(mask) -> None:
    q, k, v = draw(4, 2, 60, 60, 8, 8, batch=1)
    cu = torch.tensor([0, 3, 3, 23, 43, 50])  # lengths 3, 0, 20, 20, 7, and a tail
    assert "sdpa: runs" in ops.explain(q, k, v, mask=mask, cu_seqlens_q=cu)
    got = ops.attention(q, k, v, mask=mask, cu_seqlens_q=cu, backend="sdpa")
    want = ops.attention(q, k, v, mask=mask, cu_seqlens_q=cu, backend="reference")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, None, [q, k, v]), gradients(want, None, [q, k, v]))
    assert "share their boundaries" in ops.explain(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu.clamp(max=40))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case in ("key_lengths", "dense", "packed") for backend in ("reference", "tiled", "sdpa")],
)
def test_what_stands_in_hidden_places_never_leaks(case, backend, poison) -> None:
    q, k, v = draw(4, 2, 10, 10, 8, 8, batch=1 if case == "packed" else 2)
    options, hidden_keys, hidden_queries = {
        "key_lengths": ({"key_lengths": torch.tensor([6, 0])}, [(0, slice(6, None)), (1, slice(None))], []),
        "dense": ({"mask": Causal().dense(10, 10) & (torch.arange(10) > 2)}, [(0, slice(0, 3)), (1, slice(0, 3))], []),
        "packed": ({"cu_seqlens_q": torch.tensor([0, 4, 7])}, [(0, slice(7, None))], [(0, slice(7, None))]),
    }[case]
    clean = ops.attention(q, k, v, **options, backend=backend)
    clean_grads = gradients(clean, None, [q, k, v])
    dirty = [t.detach().clone() for t in (q, k, v)]
    for places, tensors in ((hidden_keys, dirty[1:]), (hidden_queries, dirty[:1])):
        for b, place in places:
            for t in tensors:
                t[b, :, place] = poison
    dirty = [t.requires_grad_() for t in dirty]
    out = ops.attention(*dirty, **options, backend=backend)
    assert torch.equal(out, clean)
    for got, want in zip(gradients(out, None, dirty), clean_grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(backend) -> None:
    q, k, v = draw(2, 1, 4, 5, 8, 8)
    blind = torch.ones(4, 5, dtype=torch.bool)
    blind[1] = False
    out = ops.attention(q, k, v, mask=blind, backend=backend)
    assert (out[:, :, 1] == 0).all() and out[:, :, 0].abs().min() > 0
    dq, dk, _ = torch.autograd.grad(out.sum(), [q, k, v])
    assert (dq[:, :, 1] == 0).all() and dk.isfinite().all()


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_empty_inputs_give_empty_or_zero_outputs(backend, length) -> None:
    q, k, v = draw(2, 1, 3, 0, 8, 8)
    assert (ops.attention(q, k, v, backend=backend) == 0).all()
    q, k, v = draw(2, 1, 0, length, 8, 8)
    assert ops.attention(q, k, v, mask=Causal(), backend=backend).shape == (2, 2, 0, 8)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 1), (3, 1), (6, 2), (8, 1)]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_identities_between_mechanisms_hold(heads, q_len, k_len, seed) -> None:
    q, k, v = (t.detach() for t in draw(*heads, q_len, k_len, 8, 6, seed=seed))
    causal = ops.attention(q, k, v, mask=Causal(), backend="tiled")
    group = heads[0] // heads[1]
    repeated = ops.attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask=Causal())
    torch.testing.assert_close(repeated, causal)
    window = SlidingWindow(k_len) & Full()  # not simplified away
    torch.testing.assert_close(ops.attention(q, k, v, mask=window, backend="tiled"), causal)
    turned = torch.tensor([1, 0])
    torch.testing.assert_close(ops.attention(q[turned], k[turned], v[turned], mask=Causal()), causal[turned])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(ops.attention(*strided, mask=Causal(), backend="tiled"), causal)


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_gradcheck_passes(backend) -> None:
    q, k, v = draw(4, 2, 5, 5, 4, 4)
    mask = Causal() if backend == "sdpa" else SlidingWindow(3)
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, mask=mask, backend=backend), (q, k, v))


def test_dropout_scales_what_it_keeps_and_backpropagates_what_it_kept() -> None:
    q, k, v = draw(2, 2, 40, 300, 8, 8)
    torch.manual_seed(1)
    dropped = ops.attention(q, k, v, dropout_p=0.3, backend="tiled")
    whole = ops.attention(q, k, v, backend="tiled")
    assert not torch.equal(dropped, whole)
    # The output is linear in v, so with the same weights kept forward and backward <d_v, v> == <weights, out>.
    weights = torch.randn(dropped.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dq, _, dv = torch.autograd.grad(dropped, [q, k, v], weights)
    torch.testing.assert_close((dv * v).sum(), (weights * dropped).sum())
    step = 1e-6 * torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    moved = ops.attention(q + step, k, v, dropout_p=0.3, backend="tiled")
    torch.testing.assert_close(((moved - dropped) * weights).sum(), (dq * step).sum(), rtol=1e-4, atol=1e-9)
    mean = torch.stack([ops.attention(q, k, v, dropout_p=0.3, backend="tiled").detach() for _ in range(300)]).mean(0)
    assert (mean - whole).abs().mean() < 0.01
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.0), ops.attention(q, k, v))


def test_operators_pass_opcheck() -> None:
    q, k, v = draw(4, 2, 6, 7, 8, 5, batch=1)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])
    lengths, seed, dense = torch.tensor([5]), torch.tensor(7), torch.ones(6, 7, dtype=torch.bool)
    for arguments in (
        (sinks, None, None, cu_q, cu_k, None, Causal().text, 0.3, 2.0, 0.0),
        (None, dense, lengths, None, None, seed, "", 0.3, 0.0, 0.2),
    ):
        torch.library.opcheck(tiled_attention, (q, k, v, *arguments))


@pytest.mark.parametrize("backend", ["sdpa", "tiled", "reference"])
def test_compiles_without_a_graph_break(backend) -> None:
    q, k, v = draw(4, 2, 9, 9, 8, 8, dtype=torch.float32)
    lengths = torch.tensor([5, 9])
    options = {"key_lengths": lengths} if backend == "sdpa" else {"mask": SlidingWindow(4), "key_lengths": lengths}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, **options, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))
    torch.testing.assert_close(gradients(compiled(q, k, v), None, [q, k, v]), gradients(run(q, k, v), None, [q, k, v]))


def test_autocast_runs_in_its_dtype_and_sums_in_fp32() -> None:
    q, k, v = draw(2, 1, 64, 64, 16, 16, dtype=torch.float32)
    for backend in ("sdpa", "tiled"):
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.attention(q, k, v.bfloat16(), mask=Causal(), backend=backend)
        assert out.dtype == torch.bfloat16
        want = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=Causal(), backend=backend)
        assert torch.equal(out, want)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.size = max(self.size, t.untyped_storage().nbytes() if isinstance(t, Tensor) else 0)
        return out


def test_tiled_memory_is_linear_in_length_for_a_window() -> None:
    sizes = []
    for length in (1024, 4096):
        q, k, v = (torch.randn(1, h, length, 16) for h in (2, 1, 1))
        with Largest() as largest:
            arguments = (None, None, None, None, None, None, SlidingWindow(100).text, 0.25, 0.0, 0.0)
            tiled_attention._init_fn(q, k, v, *arguments)
        sizes.append(largest.size)
    inputs = 2 * 4096 * 16 * 4
    assert sizes[0] <= sizes[1] <= max(inputs, sizes[0]), sizes


def test_sdpa_is_only_called_where_its_fused_kernel_runs(monkeypatch) -> None:
    flash = 1
    real = F.scaled_dot_product_attention
    calls = []

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        calls.append(
            torch._fused_sdp_choice(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        )
        return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for mask in (None, Causal(), SlidingWindow(64), torch.ones(1, 1, 32, 32, dtype=torch.bool)):
        for lengths in (None, torch.tensor([3, 32])):
            for heads in (2, 6):
                q, k, v = draw(heads, 2, 32, 32, 16, 16, dtype=torch.float32)
                ops.attention(q, k, v, mask=mask, key_lengths=lengths)
    assert len(calls) > 8 and set(calls) == {flash}


def test_explain_names_the_choice_and_every_reason() -> None:
    q, k, v = draw(2, 1, 8, 8, 16, 8, dtype=torch.float32)
    lines = ops.explain(q, k, v, mask=SlidingWindow(3), softcap=5.0).splitlines()
    assert lines[0] == "sdpa: has no softcap; wants values as wide as keys; has no fused 'sliding_window' mask"
    assert "tiled: runs (the default order on cpu)" in lines
    assert "flash-attn-4: the package flash-attn-4 is not installed" in lines or find_spec("flash_attn")
    assert any(line.startswith("sdpa-cudnn: has no softcap; ") for line in lines)
    assert lines[-1].startswith("reference: quadratic") and len(lines) == 8
    with pytest.raises(ValueError, match="no backend can run this call\nsdpa: has no softcap"):
        ops.attention(q, k, v, softcap=5.0, backend="sdpa")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ones(2, 4, 8)}, r"q, k and v must be \[B, H, S, D\], got q \[2, 4, 8\]"),
        ({"k": ones(2, 2, 6, 5)}, r"q must be \[B, Hq, Sq, D\]"),
        ({"v": ones(2, 2, 7, 8)}, r"v \[B, Hk, Sk, Dv\], got"),
        ({"k": ones(2, 3, 6, 8), "v": ones(2, 3, 6, 8)}, "the key heads of k must divide the query heads of q"),
        ({"q": ones(2, 4, 5, 8, dtype=torch.float16)}, "one floating-point dtype, got torch.float16"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"softcap": 0.0}, "softcap must be greater than 0 or None, got 0.0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"sinks": ones(3)}, r"sinks must be \[4\] floating point, got \[3\]"),
        ({"mask": ones(5, 6)}, "mask must be one of attnzoo.masks or a bool tensor, got torch.float32"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, r"mask must broadcast to \[2, 4, 5, 6\], got \[5, 5\]"),
        ({"key_lengths": torch.tensor([1, 7])}, r"key_lengths must be in \[0, 6\], got \[1, 7\]"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "key_lengths must be int32 or int64"),
        ({"key_lengths": torch.tensor([1])}, r"key_lengths must be \[2\], got \[1\]"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, "packed sequences need a batch of 1"),
        ({"cu_seqlens_k": torch.tensor([0, 5])}, "cu_seqlens_k needs cu_seqlens_q"),
        ({"backend": "flash"}, "backend must be 'auto' or one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, message: str) -> None:
    call = {"q": ones(2, 4, 5, 8), "k": ones(2, 2, 6, 8), "v": ones(2, 2, 6, 8)} | change
    with pytest.raises(ValueError, match=message):
        ops.attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([1, 4], None, "cu_seqlens_q must start at 0"),
        ([0, 4, 3], None, "never fall"),
        ([0, 6], None, "end by 5"),
        ([0], None, r"cu_seqlens_q must be \[N \+ 1\]"),
        ([0, 4], [0, 2, 4], "must match"),
    ],
)
def test_bad_boundaries_are_refused_by_name(cu_q, cu_k, message: str) -> None:
    cu_k = None if cu_k is None else torch.tensor(cu_k)
    with pytest.raises(ValueError, match=message):
        ops.attention(*[ones(1, 2, 5, 8)] * 3, cu_seqlens_q=torch.tensor(cu_q), cu_seqlens_k=cu_k)


def test_masks_are_plain_values() -> None:
    assert isinstance(Causal() & Full(), Mask) and (Causal() & Full()) == (Causal() & Full())
