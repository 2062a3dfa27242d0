"""The fused kernels against the fp64 reference: output, logsumexp and every gradient, natively or interpreted.

Where there is no GPU, Triton's interpreter runs them, a second a case: shapes are small and adversarial, and not every
case meets every dtype. On a GPU all do, and longer sequences come on top.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import (
    Blockwise,
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    big_bird,
    longformer,
)
from tests.support.attention import DEVICE, DTYPES, ON_GPU, Case, assert_matches

pytest.importorskip("triton")

CU = torch.tensor([0, 5, 5, 30, 38], dtype=torch.int32)  # an empty document, and what is left over is dead
CU_K = torch.tensor([0, 7, 9, 30, 31], dtype=torch.int32)  # with other keys: none for some queries, no query for others
PACKED = {"batch": 1, "lengths": (41, 41)}


def lengths(*each: int) -> dict[str, Tensor]:
    return {"key_lengths": torch.tensor(each)}


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shown(*shape: int) -> Tensor:
    """A bool mask with a blind query, and a key that nobody sees."""
    mask = draw(*shape) > 0
    mask[..., 3, :] = False
    mask[..., 5] = False
    return mask


SHAPES = [
    Case("full", heads=(3, 1)),
    Case("causal", mask=Causal(), heads=(3, 3)),
    Case("more keys than queries", mask=Causal(), lengths=(23, 67), heads=(8, 1), batch=1),
    Case("more queries than keys", mask=Causal(), lengths=(67, 23)),
    Case("one token", lengths=(1, 1), d_lse=8.0),
    Case("one query", lengths=(1, 53), mask=SlidingWindow(40), heads=(8, 1)),
    Case("one key", lengths=(53, 1), mask=Causal(), batch=1, d_lse=8.0),
    Case("no keys", lengths=(5, 0), batch=1),
    Case("no queries", lengths=(0, 5), batch=1),
    Case("head_dim 1", dims=(1, 1), batch=1),
    Case("head_dim 24, values 9", dims=(24, 9), mask=Causal(), batch=1),
    Case("head_dim 72", dims=(72, 72), batch=1),
    Case("head_dim 96, values 40", dims=(96, 40), mask=Causal(), batch=1),
    Case("head_dim 192, values 128", dims=(192, 128), mask=Causal(), batch=1),
    Case("head_dim 256", dims=(256, 256), lengths=(17, 17), batch=1),
    Case("head_dim 40, values 256", dims=(40, 256), lengths=(17, 17), batch=1),
    Case("head_dim 576, values 512", dims=(576, 512), mask=Causal(), lengths=(5, 19), batch=1, trains=False),
]
OPTIONS = [
    Case("window", mask=SlidingWindow(9)),
    Case("window to both sides", mask=SlidingWindow(5, ahead=7), lengths=(61, 59), batch=1),
    Case("window ahead, one to itself", mask=SlidingWindow(1, ahead=1), lengths=(19, 41), batch=1),
    Case("window of one", mask=SlidingWindow(1), lengths=(41, 19), batch=1, d_lse=8.0),
    Case("padding", options=lengths(17, 0)),
    Case("padding, window", mask=SlidingWindow(9, ahead=3), options=lengths(37, 20)),
    Case("padding, causal, sinks", mask=Causal(), options=lengths(1, 0) | {"sinks": draw(4)}, heads=(4, 2)),
    Case("packed", mask=Causal(), options={"cu_seqlens_q": CU}, **PACKED),
    Case("packed, long boundaries", options={"cu_seqlens_q": CU.long()}, **PACKED),
    Case("packed, tiles inside a document", mask=Causal(), options={"cu_seqlens_q": torch.tensor([0, 5, 75]), "sinks":
         draw(2)}, lengths=(78, 78), batch=1),
    Case("packed, other keys", mask=SlidingWindow(4), options={"cu_seqlens_q": CU, "cu_seqlens_k": CU_K}, **PACKED),
    Case("packed, one empty document", options={"cu_seqlens_q": torch.tensor([0, 0])}, **PACKED),
    Case("softcap", mask=Causal(), options={"softcap": 2.0}),
    Case("softcap, sinks, window", mask=SlidingWindow(9), options={"softcap": 2.0, "sinks": draw(2)}),
    Case("sinks that outweigh all", mask=Causal(), options={"sinks": torch.tensor([6.0, -60.0])}, batch=1),
    Case("sinks, packed", mask=Causal(), options={"sinks": draw(2), "cu_seqlens_q": CU}, **PACKED),
    Case("ALiBi", mask=Causal(), options={"alibi_slopes": draw(2).exp()}),
    Case("ALiBi by batch", options={"alibi_slopes": draw(2, 2).exp()}, lengths=(23, 41)),
    Case("ALiBi, packed", options={"alibi_slopes": draw(2).exp(), "cu_seqlens_q": CU, "cu_seqlens_k": CU_K}, **PACKED),
    Case("ALiBi, dilated", mask=Dilated(4, 2), options={"alibi_slopes": draw(2).exp()}, batch=1),
    Case("negative scale", mask=Causal(), options={"scale": -0.7}),
    Case("no scale", mask=SlidingWindow(9), options={"scale": 0.0}, batch=1),
    Case("dense mask", mask=shown(2, 2, 37, 37)),
    Case("dense mask of keys, padding", mask=draw(2, 1, 1, 37) > 0, options=lengths(30, 37)),
    Case("dense mask of queries", mask=draw(37, 1) > 0, batch=1),
    Case("everything at once", mask=shown(2, 1, 37, 37), heads=(4, 2), options={
        "softcap": 3.0, "sinks": draw(4), "alibi_slopes": draw(4).exp(), "bias": draw(4, 37, 37), **lengths(31, 0)
    }),
]  # fmt: skip
BIASES = [
    Case(f"bias {list(shape)}", mask=mask, options={"bias": draw(*shape)}, heads=(4, 2), lengths=(19, 37))
    for shape, mask in (
        ((2, 4, 19, 37), Causal()),
        ((4, 19, 37), None),
        ((2, 1, 1, 37), None),
        ((1, 4, 19, 1), SlidingWindow(5)),
        ((19, 37), Dilated(3, 2)),
        ((), None),
    )
]
LONGFORMER = longformer(6, (0, 3, 30))
MASKS = [
    Case("dilated", mask=Dilated(4, 3), lengths=(41, 43), batch=1),
    Case("dilated ahead, fewer keys, padding", mask=Dilated(3, 2, ahead=2), lengths=(43, 31), options=lengths(31, 8)),
    Case("dilated, packed", mask=Dilated(2, 3), options={"cu_seqlens_q": CU}, **PACKED),
    Case("documents", mask=Documents([0, 5, 5, 30, 33]) & Causal(), batch=1),
    Case("global tokens", mask=GlobalTokens((0, 30)), batch=1),
    Case("random blocks", mask=RandomBlocks(1, 8, length=40), lengths=(40, 40), batch=1),
    Case("blocks", mask=Blockwise(SlidingWindow(2), 8), batch=1),
    Case("Longformer", mask=LONGFORMER, lengths=(67, 67), batch=1),
    Case("Longformer, padding", mask=LONGFORMER, options=lengths(33, 3)),
    Case("Longformer, packed", mask=longformer(4, (0, 3)), options={"cu_seqlens_q": CU}, **PACKED),
    Case("causal Longformer, more keys", mask=longformer(5, (1,), causal=True), lengths=(19, 53), batch=1),
    Case("BigBird", mask=big_bird(8, random=1, length=40), lengths=(40, 40), batch=1),
    Case("BigBird as a decoder, packed", mask=big_bird(4, random=1), options={"cu_seqlens_q": CU}, **PACKED),
    Case("by head", mask=PerHead([SlidingWindow(5), Full(), Causal(), SlidingWindow(5)]), heads=(4, 2), batch=1),
    Case("by head, nested, padding, sinks", heads=(4, 2), options=lengths(20, 0) | {"sinks": draw(4)},
         mask=(PerHead([Causal(), Dilated(3, 4), GlobalTokens(2), Causal()]) | SlidingWindow(3)) & Documents([0, 20])),
    Case("by head, packed", mask=PerHead([SlidingWindow(3), Causal()]), options={"cu_seqlens_q": CU}, **PACKED),
    Case("Longformer, softcap, bias", mask=LONGFORMER, batch=1, options={"softcap": 3.0, "bias": draw(1, 1, 37, 37)}),
]  # fmt: skip
LONG = [  # many tiles each way: only on a GPU
    Case(f"{name}, long", mask=mask, heads=(6, 2), lengths=lengths, dims=dims, options=options, batch=batch)
    for dims in ((64, 64), (96, 80), (128, 128), (192, 128), (256, 256))
    for name, mask, lengths, options, batch in (
        ("full", None, (521, 769), {}, 2),
        ("causal", Causal(), (769, 769), {}, 2),
        ("causal, more keys", Causal(), (257, 769), {"softcap": 5.0}, 2),
        ("causal, more queries", Causal(), (769, 257), {"sinks": draw(6)}, 2),
        ("softcap", Causal(), (769, 769), {"softcap": 5.0}, 2),
        ("sinks", Full(), (769, 769), {"sinks": draw(6)}, 2),
        ("window", SlidingWindow(200), (769, 769), {}, 2),
        ("both sides, square", SlidingWindow(130, ahead=150), (769, 769), {}, 2),
        ("both sides", SlidingWindow(130, ahead=150), (769, 640), {}, 2),
        ("padding", Causal(), (769, 769), {"key_lengths": torch.tensor([640, 300])}, 2),
        ("packed", Causal(), (769, 769), {"cu_seqlens_q": torch.tensor([0, 100, 100, 101, 600, 700])}, 1),
        ("packed, window, softcap, sinks", SlidingWindow(90, ahead=20), (769, 769), {
            "cu_seqlens_q": torch.tensor([0, 5, 5, 300, 769]), "softcap": 5.0, "sinks": draw(6)
        }, 1),
        ("dilated", Dilated(70, 3), (769, 769), {}, 2),
        ("Longformer", longformer(256, (0, 400)), (769, 769), {}, 2),
        ("BigBird", big_bird(64, random=1, length=768), (768, 768), {}, 2),
        ("documents", Documents([0, 300, 500]) & Causal(), (769, 769), {"alibi_slopes": draw(6).exp()}, 2),
        ("bias", Causal(), (521, 521), {"bias": draw(1, 6, 521, 521)}, 2),
        ("by head", PerHead([SlidingWindow(100), Causal(), Full()] * 2), (521, 521), {}, 2),
    )
]  # fmt: skip


def crossed(cases: list[Case], interpreted: tuple[torch.dtype, ...]) -> list:
    """Every dtype on a GPU; the interpreter takes the given ones in turn."""
    turns = [DTYPES if ON_GPU else [interpreted[n % len(interpreted)]] for n in range(len(cases))]
    each = [(case, dtype) for case, dtypes in zip(cases, turns, strict=True) for dtype in dtypes]
    return [pytest.param(*one, id=f"{one[0].name}, {str(one[1]).removeprefix('torch.')}") for one in each]


ALTERNATE = (torch.float32, torch.float16)
EVERY = [
    *crossed([*SHAPES, *OPTIONS, *BIASES, *MASKS], ALTERNATE),
    *(crossed(LONG, ALTERNATE) if ON_GPU else []),
]


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_output_logsumexp_and_gradients_are_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(zlib.crc32(case.name.encode()))
    assert_matches(case.draw(dtype), case.settings(), trains=case.trains, lse_weight=case.d_lse)


def strided(kind: str, t: Tensor) -> Tensor:
    """The same numbers in other places: heads inside rows, every second column, or one batch entry for all."""
    if kind == "heads inside rows":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns apart":
        return torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)[..., ::2]
    if kind == "rows inside columns":
        return t.mT.contiguous().mT
    return t[:1].expand_as(t)


@pytest.mark.parametrize("dtype", DTYPES[-1:])
@pytest.mark.parametrize("kind", ["heads inside rows", "columns apart", "rows inside columns", "one for all"])
def test_strides_do_not_matter(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    case = Case("strided", heads=(4, 2), lengths=(19, 37), mask=Causal())
    inputs = [strided(kind, t.detach()).requires_grad_() for t in case.draw(dtype)]
    assert kind == "one for all" or not inputs[0].is_contiguous()
    out, _, grads = assert_matches(inputs, case.settings())
    if kind == "heads inside rows":  # a projection after attention needs no copy then
        assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


def test_small_tensors_may_be_views_too() -> None:
    torch.manual_seed(2)
    inputs = Case("views").draw(torch.float32)
    apart = {
        "key_lengths": torch.tensor([30, 99, 8, 99])[::2],
        "sinks": torch.tensor([1.0, 50.0, -1.0, 50.0])[::2],
        "alibi_slopes": torch.tensor([[0.5], [0.1]], dtype=torch.float64).expand(2, 2),
        "bias": torch.randn(37, 74)[:, ::2],
    }
    options = {name: t.to(DEVICE) for name, t in apart.items()}
    options |= {name: options[name].detach().requires_grad_() for name in ("sinks", "bias")}
    assert_matches(inputs, options)
    one = {"key_lengths": torch.tensor(30, dtype=torch.int32, device=DEVICE).expand(2)}
    assert_matches(inputs, one | {"alibi_slopes": torch.tensor(0.3, device=DEVICE).expand(2)}, trains=False)
    packed = [t[:1].detach().requires_grad_() for t in inputs]
    assert_matches(packed, {"cu_seqlens_q": torch.tensor([0, 9, 5, 9, 37, 9], device=DEVICE)[::2]}, trains=False)


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, lse: lse.sum(),
        lambda out, lse: (lse.transpose(0, 2) * torch.linspace(-1, 1, 37, device=DEVICE)[:, None, None]).sum(),
        lambda out, lse: out.sum(),
    ],
    ids=["the logsumexp's sum", "the logsumexp's transpose", "the output's sum"],
)
def test_gradients_that_arrive_expanded_or_alone_are_read_as_they_are(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    inputs = Case("views").draw(torch.float32)
    found, wanted = (
        torch.autograd.grad(loss(*ops.attention(*inputs, return_lse=True, backend=name)), inputs, allow_unused=True)
        for name in ("triton", "reference")
    )
    for mine, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if want is None else want, rtol=1e-4, atol=1e-5)


HIDDEN = {  # what hides, then keys that nobody sees and queries that see none
    "padding": ({**lengths(30, 0)}, [(0, slice(30, 37)), (1, slice(0, 37))], []),
    "packing": ({"cu_seqlens_q": CU.clamp(max=30), "cu_seqlens_k": CU_K}, [(0, slice(31, 37))], [(0, slice(30, 37))]),
    "packing, documents": (
        {"cu_seqlens_q": CU.clamp(max=30), "mask": SlidingWindow(3) | GlobalTokens(1)},
        [(0, slice(30, 37))],
        [(0, slice(30, 37))],
    ),
    "dense": ({"mask": shown(2, 1, 37, 37)}, [(0, 5), (1, 5)], [(0, 3), (1, 3)]),
    "listed": ({"mask": Causal() & Documents([0, 9, 9, 30])}, [(0, slice(30, 37))], [(0, slice(30, 37))]),
    "window": ({"mask": SlidingWindow(4, ahead=2), "lengths": (17, 37)}, [(0, slice(0, 17)), (1, slice(0, 17))], []),
    "causal": ({"mask": Causal(), "lengths": (37, 17)}, [], [(0, slice(0, 20)), (1, slice(0, 20))]),
    "dilated": ({"mask": Dilated(2, 3), "lengths": (11, 37)}, [(0, slice(0, 23)), (1, slice(0, 23))], []),
}


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30] if ON_GPU else [math.nan])
@pytest.mark.parametrize("extra", ["", "softcap", "ALiBi and bias"])
@pytest.mark.parametrize("case", HIDDEN)
def test_what_stands_where_nobody_looks_never_leaks(case: str, extra: str, poison: float) -> None:
    if extra and not ON_GPU and case not in ("padding", "dense", "listed"):
        pytest.skip("the interpreter is slow")
    if extra == "ALiBi and bias" and case.startswith("packing"):
        pytest.skip("packed sequences have no bias")
    torch.manual_seed(4)
    options, keys, queries = HIDDEN[case]
    options = dict(options)
    each = options.pop("lengths", (37, 37))
    options |= {"softcap": {"softcap": 3.0}, "": {}}.get(extra, {"alibi_slopes": draw(2).exp(), "bias": draw(2, *each)})
    call = Case(
        case, lengths=each, batch=1 if case in ("packing", "packing, documents", "listed") else 2, options=options
    )
    inputs, settings = call.draw(torch.float32 if poison == 1e30 else DTYPES[-1]), call.settings()
    blind = torch.zeros(call.batch, 2, each[0], dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        for b, at in keys:
            inputs[1][b, :, at], inputs[2][b, :, at] = poison, poison
        for b, at in queries:
            inputs[0][b, :, at] = poison
            blind[b, :, at] = True
    out, _, (d_q, d_k, d_v, *_) = assert_matches(inputs, settings, poisoned_rows=blind)
    assert (out[blind] == 0).all() and (d_q[blind] == 0).all()
    for b, at in keys:
        assert (d_k[b, :, at] == 0).all() and (d_v[b, :, at] == 0).all()


@pytest.mark.parametrize("poison", [0.0, math.nan])
def test_minus_infinity_in_a_bias_hides_as_a_mask_does(poison: float) -> None:
    torch.manual_seed(5)
    bias = draw(1, 2, 37, 37)
    bias[:, :, 3], bias[..., 5], bias[:, 1, 0, :7] = -math.inf, -math.inf, -math.inf
    case = Case("bias that hides", options={"bias": bias})
    inputs, blind = case.draw(torch.float32), torch.zeros(2, 2, 37, dtype=torch.bool, device=DEVICE)
    blind[:, :, 3] = poison != 0
    with torch.no_grad():
        inputs[0][:, :, 3], inputs[1][:, :, 5], inputs[2][:, :, 5] = poison, poison, poison
    assert_matches(inputs, case.settings(), poisoned_rows=blind)


@pytest.mark.parametrize("case", ["packed", "dilated", "Longformer", "bias", "one token"])
def test_nothing_is_left_of_what_stood_in_memory_before(case: str) -> None:
    torch.manual_seed(6)
    call = {
        "packed": Case(case, mask=Causal(), options={"cu_seqlens_q": CU, "cu_seqlens_k": CU_K}, **PACKED),
        "dilated": Case(case, mask=Dilated(2, 3), lengths=(19, 37), batch=1),
        "Longformer": Case(case, mask=LONGFORMER, options=lengths(20, 0)),
        "bias": Case(case, dims=(24, 24), options={"bias": draw(1, 1, 37, 37)}),
        "one token": Case(case, lengths=(1, 1), d_lse=8.0),
    }[case]
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:  # `torch.empty` gives NaN then
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert_matches(call.draw(DTYPES[-1]), call.settings(), lse_weight=call.d_lse)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("sinks", [False, True])
def test_blind_queries_give_zero_and_minus_infinity_and_take_no_gradient(sinks: bool) -> None:
    torch.manual_seed(7)
    inputs = Case("blind").draw(torch.float32)
    options = {"mask": torch.zeros(37, 37, dtype=torch.bool, device=DEVICE)}
    options |= {"sinks": torch.zeros(2, device=DEVICE, requires_grad=True)} if sinks else {}
    leaves = [*inputs, options["sinks"]] if sinks else inputs
    out, lse = ops.attention(*inputs, **options, return_lse=True, backend="triton")
    assert (out == 0).all() and (lse == -math.inf).all()
    grads = torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))
    assert all((grad == 0).all() for grad in grads)
