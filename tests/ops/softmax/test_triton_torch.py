"""The fused kernels inside PyTorch: compiled, checkpointed, under autocast, mapped, captured in a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Mask, SlidingWindow, longformer
from tests.support.attention import DEVICE, ON_GPU, Case

pytest.importorskip("triton")

from attnzoo.ops.softmax.triton.op import fused_attention, fused_attention_backward

CU = torch.tensor([0, 3, 3, 11], device=DEVICE)
BACKEND = "inductor" if ON_GPU else "aot_eager"  # inductor's own kernels are not the interpreter's business
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def draw(batch: int = 2, heads: int = 2, length: int = 13, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    return Case("", heads=(heads, 1), lengths=(length, length), batch=batch).draw(dtype)


def call_of(kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves, and the options of a call to `attention`."""
    torch.manual_seed(0)
    inputs = draw(batch=1 if kind == "packed" else 2)
    options: dict[str, Any] = {
        "causal": {"mask": Causal()},
        "window, softcap": {"mask": SlidingWindow(5), "softcap": 3.0},
        "padding": {"key_lengths": torch.tensor([13, 4], device=DEVICE)},
        "packed": {"mask": Causal(), "cu_seqlens_q": CU},
        "sinks, bias": {
            "sinks": torch.zeros(2, device=DEVICE, requires_grad=True),
            "bias": torch.randn(1, 1, 13, 13, device=DEVICE, requires_grad=True),
        },
        "ALiBi, dense": {
            "alibi_slopes": torch.rand(2, device=DEVICE),
            "mask": torch.rand(13, 13, device=DEVICE) > 0.3,
        },
        "listed": {"mask": longformer(4, (0, 5))},
        "dilated": {"mask": Dilated(2, 3)},
        "dropout": {"dropout_p": 0.3},
    }[kind]
    return [*inputs, *(options[name] for name in ("sinks", "bias") if name in options)], options


def arguments(kind: str) -> tuple[Any, ...]:
    """The same call, as the operator takes it."""
    leaves, options = call_of(kind)
    mask = options.get("mask", None)
    dense, text = (
        (mask, "")
        if isinstance(mask, Tensor)
        else (None, mask.text if isinstance(mask, Mask) else '{"pattern": "full"}')
    )
    seed = torch.tensor(7, device=DEVICE) if "dropout_p" in options else None
    cu = options.get("cu_seqlens_q")
    names = ("sinks", "bias", "alibi_slopes")
    tensors = (*leaves[:3], *(options.get(name) for name in names), dense, options.get("key_lengths"), cu, cu, seed)
    return *tensors, text, 0.25, options.get("softcap", 0.0), options.get("dropout_p", 0.0)


KINDS = [
    "causal",
    "window, softcap",
    "padding",
    "packed",
    "sinks, bias",
    "ALiBi, dense",
    "listed",
    "dilated",
    "dropout",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_passes_opcheck(kind: str) -> None:
    torch.library.opcheck(fused_attention, arguments(kind), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["causal", "packed", "sinks, bias", "dropout"])
def test_the_backward_passes_opcheck(kind: str) -> None:
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in arguments(kind)]
    out, lse = fused_attention(*inputs)
    d_lse = None if kind == "causal" else torch.randn_like(lse)
    wanted = kind == "sinks, bias"
    torch.library.opcheck(
        fused_attention_backward, (torch.randn_like(out), d_lse, out, lse, *inputs, wanted), atol=1e-2, rtol=1e-2
    )


def forward_and_backward(run: Callable[..., Any], leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    out, lse = run(*leaves[:3], **options)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype)
    weights_lse = weights[..., 0].float().masked_fill(lse == -math.inf, 0)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (weights, weights_lse))]


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.attention(q, k, v, **options, return_lse=True, backend="triton")


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_compiled_without_a_graph_break_it_gives_what_it_gives_otherwise(kind: str) -> None:
    torch._dynamo.reset()
    leaves, options = call_of(kind)
    compiled = torch.compile(attend, fullgraph=True, backend=BACKEND)
    for got, want in zip(
        forward_and_backward(compiled, leaves, options), forward_and_backward(attend, leaves, options), strict=True
    ):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_compiled_with_dropout_it_draws_anew_each_time() -> None:
    torch._dynamo.reset()
    leaves, options = call_of("dropout")
    compiled = torch.compile(attend, fullgraph=True, backend=BACKEND)
    first, second = (compiled(*leaves, **options)[0] for _ in range(2))
    assert first.isfinite().all() and not torch.equal(first, second)


def test_lengths_that_change_compile_once() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=BACKEND)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (11, 13, 17):
            inputs = draw(length=length)
            torch.testing.assert_close(compiled(*inputs, mask=Causal()), attend(*inputs, mask=Causal()))


@pytest.mark.parametrize("kind", ["causal", "sinks, bias", "dropout"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_and_draws_the_same_dropout_again(kind: str, reentrant: bool) -> None:
    leaves, options = call_of(kind)

    def run(*inputs: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(lambda *t: attend(*t, **rest), *inputs, use_reentrant=reentrant)

    if reentrant:  # it gives gradients to what it is handed, and through `backward` alone

        def grads(one: Callable[..., Any]) -> list[Tensor]:
            torch.manual_seed(1)
            own = [t.detach().requires_grad_() for t in leaves[:3]]
            out, _ = one(*own, **{n: t.detach() if isinstance(t, Tensor) else t for n, t in options.items()})
            (out.float() ** 2).sum().backward()
            return [out, *(t.grad for t in own)]

        pairs = zip(grads(run), grads(attend), strict=True)
    else:
        pairs = zip(
            forward_and_backward(run, leaves, options), forward_and_backward(attend, leaves, options), strict=True
        )
    for got, want in pairs:
        assert torch.equal(got, want)


def test_autocast_casts_the_inputs_and_gives_gradients_in_their_own_dtype() -> None:
    torch.manual_seed(2)
    inputs, low = draw(dtype=torch.float32), torch.bfloat16 if ON_GPU else torch.float16
    with torch.autocast(DEVICE.type, dtype=low):
        out, lse = attend(*inputs, mask=Causal())
    assert out.dtype == low and lse.dtype == torch.float32
    by_hand, _ = attend(*(t.to(low) for t in inputs), mask=Causal())
    torch.testing.assert_close(out, by_hand, rtol=0, atol=0)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in grads)


MAPPED: dict[str, tuple[tuple[int, ...] | None, str]] = {  # an option's shape without the mapped dimension
    "nothing else": (None, ""),
    "lengths": ((2,), "key_lengths"),
    "a bias of all": ((2, 2, 9, 9), "bias"),
    "a bias of heads": ((2, 9, 9), "bias"),
    "one bias": ((), "bias"),
    "slopes": ((2,), "alibi_slopes"),
    "slopes by batch": ((2, 2), "alibi_slopes"),
    "masks": ((9, 9), "mask"),
    "sinks": ((2,), "sinks"),
}


@pytest.mark.parametrize("each", [True, False], ids=["its own", "shared"])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop(name: str, each: bool) -> None:
    torch.manual_seed(3)
    shape, option = MAPPED[name]
    if shape is None and not each:
        pytest.skip("nothing to share")
    q, k, v = (torch.randn(3, 2, heads, 9, 16, device=DEVICE) for heads in (2, 1, 1))
    extra = torch.randn((3, *(shape or ())) if each else shape, device=DEVICE)
    extra = {"key_lengths": (extra.abs() * 5).long().clamp(max=9), "mask": extra > 0, "alibi_slopes": extra.exp()}.get(
        option, extra
    )

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        options = {option: extra} if option else {}
        return ops.attention(q, k, v, **options, return_lse=True, backend=backend)

    got = torch.vmap(lambda *t: run("triton", *t), in_dims=(2, 0, 3, 0 if each else None))(
        q.movedim(0, 2), k, v.movedim(0, 3), extra
    )
    loop = [run("reference", q[n], k[n], v[n], extra[n] if each else extra) for n in range(3)]
    for a, b in zip(got, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-4, atol=1e-5)


def test_vmap_shares_keys_that_are_not_mapped_and_runs_packed_sequences() -> None:
    torch.manual_seed(4)
    q, k, v = (torch.randn(3, 1, heads, 13, 16, device=DEVICE) for heads in (2, 1, 1))
    for options in ({"mask": Causal()}, {"cu_seqlens_q": CU}):
        got = torch.vmap(lambda q, o=options: attend(q, k[0], v[0], **o)[0])(q)
        want = torch.stack([attend(one, k[0], v[0], **options)[0] for one in q])
        torch.testing.assert_close(got, want)


def test_vmap_drops_alike_or_differently_as_it_is_told() -> None:
    inputs = [t.detach().expand(3, *t.shape) for t in draw(batch=1)]
    for randomness in ("same", "different"):
        out = torch.vmap(lambda *t: attend(*t, dropout_p=0.5)[0], randomness=randomness)(*inputs)
        assert torch.equal(out[0], out[1]) == (randomness == "same")


@pytest.mark.parametrize("kind", ["causal", "padding", "packed", "sinks, bias"])
def test_gradients_of_many_losses_at_once_equal_a_loop(kind: str) -> None:
    leaves, options = call_of(kind)
    out, _ = attend(*leaves[:3], **options)
    losses = torch.randn(3, *out.shape, device=DEVICE).to(out.dtype)
    got = torch.vmap(lambda loss: torch.autograd.grad(out, leaves, loss, retain_graph=True))(losses)
    each = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in losses]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_double_backward_is_refused_in_words(compiled: bool) -> None:
    inputs = draw()
    run = fused_attention if compiled else attend
    rest = (*[None] * 8, '{"pattern": "full"}', 0.25, 0.0, 0.0) if compiled else ()
    out, _ = run(*inputs, *rest)
    (d_q,) = torch.autograd.grad(out.float().square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|fused_attention_backward.* no autograd formula"):
        d_q.float().sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_replays_forward_and_backward_on_new_inputs(kind: str) -> None:
    leaves, options = call_of(kind)
    weights = torch.randn(leaves[0].shape, device=DEVICE, dtype=DTYPE)

    def step() -> tuple[Tensor, ...]:
        out, _ = attend(*leaves[:3], **options)
        return out, *torch.autograd.grad(out, leaves, weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # masks' tables are made, and kernels compiled, before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    if kind == "dropout":  # each replay draws anew
        before = recorded[0].clone()
        graph.replay()
        assert not torch.equal(before, recorded[0])
        return
    for got, want in zip(recorded, step(), strict=True):
        torch.testing.assert_close(got, want)
