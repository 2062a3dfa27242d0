"""The fused kernels against the fp64 reference: output, logsumexp and every gradient, natively or interpreted.

Where there is no GPU, Triton's interpreter runs them, a second a case: shapes are small and adversarial, and not every
case meets every dtype. On a GPU all do, and longer sequences come on top.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

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
from tests.support.attention import DTYPES, ON_GPU, Case, assert_matches

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
    Case("one token", lengths=(1, 1)),
    Case("one query", lengths=(1, 53), mask=SlidingWindow(40), heads=(8, 1)),
    Case("one key", lengths=(53, 1), mask=Causal(), batch=1),
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
    Case("window of one", mask=SlidingWindow(1), lengths=(41, 19), batch=1),
    Case("padding", options=lengths(17, 0)),
    Case("padding, window", mask=SlidingWindow(9, ahead=3), options=lengths(37, 20)),
    Case("padding, causal, sinks", mask=Causal(), options=lengths(1, 0) | {"sinks": draw(4)}, heads=(4, 2)),
    Case("packed", mask=Causal(), options={"cu_seqlens_q": CU}, **PACKED),
    Case("packed, long boundaries", options={"cu_seqlens_q": CU.long()}, **PACKED),
    Case("packed, other keys", mask=SlidingWindow(4), options={"cu_seqlens_q": CU, "cu_seqlens_k": CU_K}, **PACKED),
    Case("packed, one empty document", options={"cu_seqlens_q": torch.tensor([0, 0])}, **PACKED),
    Case("softcap", mask=Causal(), options={"softcap": 2.0}),
    Case("softcap, sinks, window", mask=SlidingWindow(9), options={"softcap": 2.0, "sinks": draw(2)}),
    Case("sinks that outweigh all", mask=Causal(), options={"sinks": torch.tensor([30.0, -30.0])}, batch=1),
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
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256))
    for name, mask, lengths, options, batch in (
        ("full", None, (521, 769), {}, 2),
        ("causal", Causal(), (769, 769), {}, 2),
        ("causal, more keys", Causal(), (257, 769), {"softcap": 5.0}, 2),
        ("causal, more queries", Causal(), (769, 257), {"sinks": draw(6)}, 2),
        ("window", SlidingWindow(200), (769, 769), {}, 2),
        ("both sides", SlidingWindow(130, ahead=150), (769, 640), {}, 2),
        ("padding", Causal(), (769, 769), {"key_lengths": torch.tensor([640, 300])}, 2),
        ("packed", Causal(), (769, 769), {"cu_seqlens_q": torch.tensor([0, 100, 100, 101, 600, 700])}, 1),
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
    assert_matches(case.draw(dtype), case.settings(), trains=case.trains)
