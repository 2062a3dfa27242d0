"""The Triton kernels of linear attention against the fp64 reference: interpreted where there is no GPU, natively where
there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.ops.linear import State
from attnzoo.ops.linear.triton.op import linear_attention_triton
from attnzoo.ops.linear.triton.step import linear_attention_triton_step
from tests.ops.naive_linear import MAPS
from tests.support.compare import assert_as_accurate

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # bf16 is wrong in the interpreter


def draw(heads: tuple[int, int], q_len: int, k_len: int, dim: int, v_dim: int, batch: int = 1) -> list[Tensor]:
    """Random q, k and v in fp64."""
    generator = torch.Generator().manual_seed(heads[0] + q_len)
    shapes = ((heads[0], q_len, dim), (heads[1], k_len, dim), (heads[1], k_len, v_dim))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]


def draw_state(count: int, heads: int, dim: int, v_dim: int, normalize: bool = True) -> State:
    generator = torch.Generator().manual_seed(7)
    s = torch.rand(count, heads, dim, v_dim, generator=generator, dtype=torch.float64).to(DEVICE)
    return State(s, s[..., 0] + 1 if normalize else None)


def cast(tensors: Any, dtype: torch.dtype) -> list[Tensor | None]:
    """Copies of a dtype that require gradients."""
    return [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]


def gradients(outputs: Any, inputs: Any) -> list[Tensor]:
    """Gradients of a fixed random sum of all outputs."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for o in outputs:
        if o is not None:
            total = total + (o * torch.randn(o.shape, generator=generator).to(o)).sum().double()
    return list(torch.autograd.grad(total, [i for i in inputs if i is not None]))


def run(backend: str, tensors: list[Tensor], state: State | None, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output, last state and all gradients; the inputs rounded to fp16 first, so that every dtype starts alike."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = cast(tensors, dtype)
    given = None if state is None else State(*cast([None if t is None else t.float() for t in state], wide))
    out, new = ops.linear_attention(*inputs, initial_state=given, return_state=True, backend=backend, **options)
    outputs = [out, *new]
    grads = gradients(outputs, [*inputs, *(given or ())])
    return [t for t in outputs if t is not None] + grads


def compare(tensors: list[Tensor], state: State | None, dtype: torch.dtype, **options: Any) -> None:
    """The kernels may err twice as much as the parallel form does, of what is rounded alike."""
    tensors = [t.to(dtype) for t in tensors]
    truth = run("reference", tensors, state, torch.float64, **options)
    plain = run("reference", tensors, state, dtype, **options)
    got = run("triton", tensors, state, dtype, **options)
    assert len(truth) == len(got)
    for number, (mine, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
        assert mine.shape == exact.shape and mine.dtype == theirs.dtype
        if exact.numel() == 0:
            continue
        # fp16 is multiplied as tf32 on a GPU, where plain PyTorch's reference here sums in fp32.
        floor = 2.0 ** (-7 if dtype == torch.bfloat16 else -10) * exact.abs().max() if dtype in HALF else 0.0
        error = (mine.double() - exact).abs().max()
        allowed = (
            2 * (theirs.double() - exact).abs().max() + floor + 4 * torch.finfo(mine.dtype).eps * exact.abs().max()
        )
        assert error <= allowed, f"number {number}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "relu", "state": True, "normalize": False},
        {"feature_map": "identity", "normalize": False, "scale": 0.3, "lengths": [0, 61]},
        {"decay": True, "lengths": [23, 61], "state": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_outputs_states_and_gradients_are_those_of_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    options = dict(options)
    tensors = draw((2, 1), 61, 61, 24, 40, batch=2)
    normalize = options.get("normalize", True)
    state = draw_state(2, 1, 24, 40, normalize) if options.pop("state", False) else None
    if options.pop("decay", False):
        options["log_decay"] = torch.tensor([-0.1], device=DEVICE)
    if "lengths" in options:
        options["key_lengths"] = torch.tensor(options.pop("lengths"), device=DEVICE)
    compare(tensors, state, dtype, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_packed_documents_start_anew_and_rows_after_the_last_are_zero(causal: bool, normalize: bool) -> None:
    tensors = draw((2, 2), 131, 131, 16, 16)
    ends = torch.tensor([0, 3, 3, 100, 127], device=DEVICE)
    options = {"causal": causal, "normalize": normalize, "cu_seqlens": ends}
    if causal:
        options["log_decay"] = torch.tensor([-0.2, -0.01], device=DEVICE)
    compare(tensors, draw_state(4, 2, 16, 16, normalize), torch.float32, **options)
    q, k, v = (t.float() for t in tensors)
    assert (ops.linear_attention(q, k, v, **options, backend="triton")[:, :, 127:] == 0).all()


@pytest.mark.parametrize(("q_len", "k_len"), [(13, 71), (90, 5), (11, 0)])
def test_without_causality_every_query_reads_every_key(q_len: int, k_len: int) -> None:
    tensors = draw((4, 2), q_len, k_len, 16, 40)
    lengths = torch.tensor([min(k_len, 50)], device=DEVICE)
    compare(tensors, draw_state(1, 2, 16, 40), torch.float32, causal=False, key_lengths=lengths)


@pytest.mark.parametrize("dim", [1, 16, 33, 256])
def test_heads_of_any_size_up_to_256_run(dim: int) -> None:
    compare(draw((1, 1), 20, 20, dim, max(1, 256 // dim)), None, torch.float32)


def test_features_may_be_wider_than_the_values() -> None:
    q, k, v = (t.float().requires_grad_() for t in draw((1, 1), 20, 20, 16, 16))
    values = v.detach().half().requires_grad_()
    got = ops.linear_attention(q, k, values, backend="triton")
    want = ops.linear_attention(q, k, values, backend="reference")
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    grads = [torch.autograd.grad(out.float().square().sum(), (q, k, values)) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("case", ["padded", "packed", "bidirectional"])
def test_what_stands_in_padding_never_leaks(case: str) -> None:
    q, k, v = (t.float() for t in draw((2, 1), 40, 40, 16, 16, batch=1 if case == "packed" else 2))
    options: dict[str, Any] = {"key_lengths": torch.tensor([27, 0], device=DEVICE)}
    if case == "packed":
        options = {"cu_seqlens": torch.tensor([0, 6, 27], device=DEVICE)}
    options["causal"] = case != "bidirectional"
    results = []
    for poison in (None, math.nan, 1e30):
        inputs = [t.clone() for t in (q, k, v)]
        for t in inputs if case != "bidirectional" else inputs[1:]:
            if poison is not None:
                t[0, :, 27:] = poison
                t[1:] = poison
        inputs = [t.requires_grad_() for t in inputs]
        out, state = ops.linear_attention(*inputs, **options, return_state=True, backend="triton")
        results.append([out, *state, *gradients([out, *state], inputs)])
    for other in results[1:]:
        for want, got in zip(results[0], other, strict=True):
            assert torch.equal(want, got)


def test_a_query_that_no_key_answers_gives_zero_and_no_nan() -> None:
    q, k, v = (t.float() for t in draw((2, 1), 40, 40, 16, 16))
    k[:, :, :20] = -k[:, :, :20].abs()  # relu leaves nothing of them
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = ops.linear_attention(*inputs, feature_map="relu", backend="triton")
    assert (out[:, :, :20] == 0).all() and out.isfinite().all() and out[:, :, 25:].abs().sum() > 0
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()


def test_strides_may_be_any_and_the_output_takes_the_layout_of_the_queries() -> None:
    q, k, v = (t.float() for t in draw((2, 1), 20, 20, 16, 16))
    want = ops.linear_attention(q, k, v, backend="triton")
    rows = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    got = ops.linear_attention(*rows, backend="triton")
    assert torch.equal(got, want) and got.transpose(1, 2).is_contiguous()
    across = [t.mT.contiguous().mT for t in (q, k, v)]
    assert torch.equal(ops.linear_attention(*across, backend="triton"), want)


@pytest.mark.parametrize("sizes", [(16, 16), (40, 72)])
def test_chunks_without_padding_need_no_masks(sizes: tuple[int, int]) -> None:
    compare(draw((2, 1), 64, 64, *sizes), None, torch.float32)


@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, mean: float) -> None:
    q, k, v = draw((2, 1), 67, 67, 16, 24)
    exact = [t.to(dtype).requires_grad_() for t in (q, k, v + mean)]
    wide = [t.detach().double().requires_grad_() for t in exact]
    own = [t.detach().requires_grad_() for t in exact]
    truth = ops.linear_attention(*wide, backend="reference")
    weights = (MAPS["elu"](own[0]) @ MAPS["elu"](own[1]).mT).tril()
    plain = (weights / weights.sum(-1, keepdim=True)) @ own[2]
    got = ops.linear_attention(*exact, backend="triton")
    assert_as_accurate("out", got, plain, truth)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    grads = [torch.autograd.grad(o, i, upstream.to(o.dtype)) for o, i in ((got, exact), (plain, own), (truth, wide))]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one)


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_step_is_the_recurrent_one_and_writes_the_state_in_place(
    tokens: int, normalize: bool, dtype: torch.dtype
) -> None:
    q, k, v = (t.to(dtype) for t in draw((6, 2), tokens, tokens, 24, 40, batch=2))
    options: dict[str, Any] = {"log_decay": torch.tensor([-0.1, 0.0], device=DEVICE), "feature_map": "elu"}
    for lengths in (None, torch.tensor([tokens - 1, tokens], device=DEVICE)):
        state = State(*(None if t is None else t.float() for t in draw_state(2, 2, 24, 40, normalize)))
        held = State(*(None if t is None else t.clone() for t in state))
        want = ops.linear_step(q, k, v, state, lengths=lengths, **options, backend="recurrent")
        got = ops.linear_step(q, k, v, held, lengths=lengths, **options, backend="triton")
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(held.s, state.s)
        if normalize:
            torch.testing.assert_close(held.z, state.z)


def test_a_step_writes_into_states_of_any_strides() -> None:
    q, k, v = (t.float() for t in draw((2, 2), 1, 1, 16, 16, batch=2))
    state = State(*(t.float() for t in draw_state(2, 2, 16, 16)))
    turned = State(state.s.mT.contiguous().mT, state.z.transpose(0, 1).contiguous().transpose(0, 1))
    want = ops.linear_step(q, k, v, state, backend="triton")
    assert torch.equal(ops.linear_step(q, k, v, turned, backend="triton"), want)
    assert torch.equal(turned.s, state.s) and torch.equal(turned.z, state.z)


def test_a_few_tokens_with_a_state_are_stepped_and_leave_the_given_state_alone() -> None:
    q, k, v = (t.float() for t in draw((2, 2), 3, 3, 16, 16))
    state = State(*(t.float() for t in draw_state(1, 2, 16, 16)))
    before = [t.clone() for t in state]
    with torch.no_grad():
        out, new = ops.linear_attention(q, k, v, initial_state=state, return_state=True, backend="triton")
    want, wanted = ops.linear_attention(q, k, v, initial_state=state, return_state=True, backend="reference")
    torch.testing.assert_close([out, *new], [want, *wanted])
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_operators_pass_opcheck() -> None:
    q, k, v = (t.float().requires_grad_() for t in draw((2, 1), 20, 20, 16, 16))
    state = [t.float().requires_grad_() for t in draw_state(1, 1, 16, 16)]
    lengths = torch.tensor([17], device=DEVICE)
    decay = torch.tensor([-0.1], device=DEVICE)
    torch.library.opcheck(linear_attention_triton, (q, k, v, *state, decay, lengths, None, "elu", True, True, 1.0))
    torch.library.opcheck(
        linear_attention_triton, (q, k, v, None, None, None, None, lengths.new_tensor([0, 9]), "elu", False, False, 0.5)
    )
    held = [t.detach().clone() for t in state]
    inputs = [t.detach()[:, :, :2] for t in (q, k, v)]
    torch.library.opcheck(linear_attention_triton_step, (*inputs, *held, decay, None, "elu", 1.0))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed: bool) -> None:
    q, k, v = (t.float().requires_grad_() for t in draw((2, 1), 30, 30, 16, 16))
    options = {"cu_seqlens": torch.tensor([0, 11, 29], device=DEVICE)} if packed else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, **options, backend="triton") * 2

    torch._dynamo.reset()
    got, want = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients([got], [q, k, v]), gradients([want], [q, k, v]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "has no fp64"),
        ({"dim": 257}, "takes features of 1 to 256, here 257"),
        ({"v_dim": 300}, "takes values of 1 to 256, here 300"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    dim, v_dim = change.get("dim", 16), change.get("v_dim", 16)
    q, k, v = (t.to(change.get("dtype", torch.float32)) for t in draw((1, 1), 4, 4, dim, v_dim))
    with pytest.raises(ValueError, match=reason):
        ops.linear_attention(q, k, v, backend="triton")
    assert reason in ops.explain_linear(q, k, v)


def test_a_step_takes_sixteen_tokens_at_most() -> None:
    q, k, v = (t.float() for t in draw((1, 1), 17, 17, 16, 16))
    state = State(*(t.float() for t in draw_state(1, 1, 16, 16)))
    with pytest.raises(ValueError, match="steps 1 to 16 tokens, here 17"):
        ops.linear_step(q, k, v, state, backend="triton")
