"""Linear attention on a GPU: kernels against the fp64 reference at real sizes, where auto runs, and CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo import ops
from attnzoo.layers import LinearAttention
from attnzoo.ops.linear import State, hybrid_step
from attnzoo.ops.linear.hedgehog import hedgehog_features
from attnzoo.ops.linear.tail import Ring
from attnzoo.ops.linear.triton import hopper_launch
from tests.support.compare import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def draw(heads, k_heads, length, dim, v_dim, *, batch=1, dtype=torch.bfloat16) -> list[Tensor]:
    shapes = ((heads, length, dim), (k_heads, length, dim), (k_heads, length, v_dim))
    return [torch.randn(batch, *s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]


def plain(q, k, v) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 1031, 64, 64), (2, 2, 1024, 64, 64), (4, 2, 2048, 128, 128), (2, 1, 333, 32, 96), (1, 1, 300, 256, 256)],
)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_error_is_at_most_twice_that_of_plain_pytorch(shape, dtype, shift) -> None:
    inputs = [(t.detach() + shift).requires_grad_() for t in draw(*shape, dtype=dtype)]
    own = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, simple, truth = ops.linear_attention(*inputs), plain(*own), plain(*exact)
    assert_as_accurate("out", got, simple, truth)
    upstream = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, i, upstream.to(o.dtype)) for o, i in ((got, inputs), (simple, own), (truth, exact))]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one)


@pytest.mark.parametrize("dim", [64, 128])
def test_error_holds_at_16k_tokens(dim) -> None:
    inputs = draw(1, 1, 16384, dim, dim)
    own = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, simple = ops.linear_attention(*inputs), plain(*own)
    truth = ops.linear_attention(*exact, backend="chunked")
    assert_as_accurate("out", got, simple, truth)
    upstream = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, i, upstream.to(o.dtype)) for o, i in ((got, inputs), (simple, own), (truth, exact))]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="is for Hopper")
@pytest.mark.parametrize(
    "options", [{}, {"feature_map": "relu"}, {"feature_map": "identity", "normalize": False}], ids=str
)
@pytest.mark.parametrize(("heads", "length"), [((4, 2), 4096), ((64, 64), 192)])
def test_the_kernel_for_hopper_gives_what_the_one_for_all_gpus_gives(monkeypatch, options, heads, length) -> None:
    q, k, v = (t.detach() for t in draw(*heads, length, 64, 64, batch=2))
    state = State(torch.rand(2, heads[1], 64, 64, device="cuda"), torch.rand(2, heads[1], 64, device="cuda") + 1)
    if not options.get("normalize", True):
        state = State(state.s, None)
    calls = []
    run = hopper_launch.attend
    monkeypatch.setattr(hopper_launch, "attend", lambda *a: (calls.append(1), run(*a)))
    got = ops.linear_attention(q, k, v, **options, initial_state=state, return_state=True)
    assert calls
    monkeypatch.setattr(hopper_launch, "takes", lambda *a, **b: False)
    want = ops.linear_attention(q, k, v, **options, initial_state=state, return_state=True)
    for mine, theirs in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        if theirs is not None:
            assert (mine.float() - theirs.float()).norm() <= 0.004 * theirs.float().norm()


def test_auto_takes_the_kernels_and_steps() -> None:
    q, k, v = (t.detach() for t in draw(2, 2, 8, 64, 64))
    assert ops.explain_linear(q, k, v).splitlines()[0] == "triton: runs"
    state = State(torch.rand(1, 2, 64, 64, device="cuda"), torch.rand(1, 2, 64, device="cuda") + 1)
    held = State(*(t.clone() for t in state))
    want = ops.linear_step(q, k, v, held, backend="recurrent")
    torch.testing.assert_close(ops.linear_step(q, k, v, state), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(state.s, held.s)


def test_forward_and_step_run_in_a_cuda_graph() -> None:
    q, k, v = (t.detach() for t in draw(2, 2, 16, 64, 64))
    state = State(torch.zeros(1, 2, 64, 64, device="cuda"), torch.zeros(1, 2, 64, device="cuda"))

    def both() -> tuple[Tensor, Tensor]:
        return ops.linear_attention(q, k, v), ops.linear_step(q, k, v, state)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stepped = both()
    for t in state:
        t.zero_()
    graph.replay()
    torch.testing.assert_close(out, stepped, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_hybrid_s_kernels_are_as_accurate_as_its_reference(dim) -> None:
    inputs = draw(4, 2, 700, dim, dim)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got = ops.hybrid_attention(*inputs, window=64, backend="triton")
    truth = ops.hybrid_attention(*exact, window=64, backend="reference")
    upstream = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, i, upstream.to(o.dtype)) for o, i in ((got, inputs), (truth, exact))]
    for name, mine, want in zip(("out", "dq", "dk", "dv"), (got, *grads[0]), (truth, *grads[1]), strict=True):
        assert (mine.double() - want).norm() <= 0.02 * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "k_heads", "dim", "window"), [(9, 3, 64, 64), (32, 8, 128, 64), (32, 1, 96, 300)])
def test_a_hybrid_step_is_as_accurate_as_plain_pytorch(heads, k_heads, dim, window, dtype) -> None:
    batch, features = 7, 2 * dim
    before = torch.tensor([0, 1, window - 2, window - 1, window, 1000, 4096], device="cuda")
    z = torch.rand(batch, k_heads, features, device="cuda") * 9
    state = State(z[..., None] * torch.randn(batch, k_heads, features, dim, device="cuda"), z)
    wide = torch.float64
    ring = [torch.randn(batch, k_heads, window - 1, n, device="cuda") for n in (dim, features, dim)]
    ring[1] = ring[1].softmax(-1)
    unused = torch.arange(window - 1, device="cuda") >= before[:, None]
    ring = Ring(*(t.masked_fill(unused[:, None, :, None], torch.nan).to(dtype) for t in ring))
    shapes = ((heads, dim), (k_heads, dim), (k_heads, dim), (heads, features), (k_heads, features))
    q, k, v, f_q, f_k = (torch.randn(batch, h, 1, n, device="cuda").to(dtype) for h, n in shapes)
    f_q, f_k = f_q.float().softmax(-1).to(dtype), f_k.float().softmax(-1).to(dtype)
    gain = torch.rand(heads, device="cuda")

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        double = dtype == wide
        held = State(*(t.to(wide) if double else t.clone() for t in state))
        kept = Ring(*(t.to(dtype, copy=True) for t in ring))
        new = [t.to(dtype) for t in (q, k, v)]
        given = {"q_features": f_q.to(dtype), "k_features": f_k.to(dtype), "near_weight": gain}
        out = hybrid_step(*new, held, kept, before, **given, feature_map="identity", backend=backend)
        return [out, *held, *kept]

    for name, got, simple, truth in zip(
        ("out", "s", "z", "ring of keys", "ring of features", "ring of values"),
        *(run(*how) for how in ((dtype, "triton"), (dtype, "plain"), (wide, "plain"))),
        strict=True,
    ):
        if name.startswith("ring"):
            assert torch.equal(got.nan_to_num(9), simple.nan_to_num(9)), name
        else:
            assert_as_accurate(name, got, simple, truth)


def test_a_graph_of_hybrid_steps_goes_round_the_ring_with_rows_of_any_lengths() -> None:
    torch.manual_seed(0)
    layer = LinearAttention(256, 4, num_kv_heads=2, feature_map="hedgehog", window=8).cuda()
    lengths = torch.tensor([1, 30, 8], device="cuda")
    x = torch.randn(3, 60, 256, device="cuda")
    with torch.no_grad():
        caches = [layer.new_cache(3) for _ in range(2)]
        for cache in caches:
            layer(x[:, :30], key_lengths=lengths, cache=cache)
        before, token = caches[0].lengths.clone(), x[:, 30:31].clone()

        def step() -> Tensor:
            q, (k, v) = layer.project_q(token), layer.project_kv(token)
            f_q, f_k = layer.features(q, query=True), layer.features(k, query=False)
            out = layer.merge(layer.decode(q, k, v, f_q, f_k, caches[0], before=before))
            before.add_(1)
            return out

        outs = [step().clone()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for at in range(31, 60):
            token.copy_(x[:, at : at + 1])
            graph.replay()
            outs.append(out.clone())
        whole = [torch.cat([x[row : row + 1, :n], x[row : row + 1, 30:]], 1) for row, n in enumerate(lengths.tolist())]
        for row, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(torch.cat(outs, 1)[row], layer(whole[row])[0, n:], rtol=1e-3, atol=1e-4)
        caches[0].advance(30, None)
        for at in range(30, 60):
            layer(x[:, at : at + 1], cache=caches[1])
        for mine, theirs in zip((*caches[0].state, *caches[0].tail), (*caches[1].state, *caches[1].tail), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(64, 9, 1, 64), (2, 4, 700, 64), (3, 2, 33, 40)])
def test_hedgehog_s_kernel_is_as_accurate_as_plain_pytorch(sizes, dtype) -> None:
    batch, heads, length, dim = sizes
    x = torch.randn(batch, length, heads, dim, device="cuda").transpose(1, 2).to(dtype)
    weight = (torch.randn(heads, dim, dim, device="cuda") / dim**0.5).to(dtype)
    truth = hedgehog_features(x.double(), weight.double())
    got, simple = (hedgehog_features(x, weight, backend=backend) for backend in ("triton", "plain"))
    assert_as_accurate("features", got, simple, truth)
