"""The kernels of others that attention dispatches to, on a GPU, against the fp64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Documents, Full, SlidingWindow
from attnzoo.ops.softmax import choice
from tests.support.compare import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CU = [0, 100, 100, 163, 250]  # a tail of 11 rows
CASES: list[tuple[str, dict[str, Any]]] = [
    *((b, {"mask": mask}) for b in ("sdpa-flash", "sdpa-cudnn", "fa3-fwd") for mask in (Full(), Causal())),
    ("sdpa-flash", {"mask": SlidingWindow(40)}),
    ("sdpa-flash", {"mask": SlidingWindow(40, ahead=9)}),
    ("sdpa-flash", {"mask": Causal(), "shape": (8, 2, 131, 261, 128)}),
    ("fa3-fwd", {"mask": Causal(), "shape": (8, 2, 131, 261, 128)}),
    ("fa3-fwd", {"mask": Causal(), "shape": (8, 2, 1, 261, 128)}),
    ("fa3-fwd", {"mask": Causal(), "shape": (4, 4, 261, 131, 64)}),
    ("fa3-fwd", {"mask": Causal(), "softcap": 5.0}),
    ("fa3-fwd", {"mask": Causal(), "packed": True}),
    ("sdpa", {"mask": Causal(), "packed": True}),
    ("sdpa", {"mask": SlidingWindow(30), "packed": True}),
    ("sdpa", {"bias": True}),
    ("sdpa", {"bias": True, "shape": (4, 4, 67, 70, 64), "dtype": torch.float32}),
    ("sdpa-flash", {"mask": Causal(), "strided": True}),
    ("sdpa-cudnn", {"mask": Causal(), "strided": True}),
    ("fa3-fwd", {"mask": Causal(), "strided": True}),
    ("flash-attn-4", {"mask": Full()}),
    ("flash-attn-4", {"mask": Causal()}),
    ("flash-attn-4", {"mask": Causal(), "strided": True}),
    ("flash-attn-4", {"mask": Causal(), "shape": (8, 2, 131, 261, 128)}),
    ("flash-attn-4", {"mask": SlidingWindow(40)}),
    ("flash-attn-4", {"mask": SlidingWindow(40, ahead=9), "shape": (8, 2, 131, 261, 128)}),
    ("flash-attn-4", {"mask": Causal(), "softcap": 5.0}),
    ("flash-attn-4", {"mask": Causal(), "sinks": True}),
    ("flash-attn-4", {"mask": Causal(), "packed": True}),
    ("flash-attn-4", {"mask": Causal(), "packed": True, "softcap": 5.0}),
]


def normal(*shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    t = torch.randn(*shape, device="cuda", dtype=dtype)
    if strided:  # a tensor `[B, H, D, S]` seen from the side: its last stride is not 1
        t = torch.randn(*shape[:2], shape[3], shape[2], device="cuda", dtype=dtype).mT
    return t.requires_grad_()


def plain(q, k, v, visible, softcap, bias, sinks) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    p = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)[..., : k.shape[2]]
    return p @ v.repeat_interleave(group, 1)


def run_or_skip(backend: str, *inputs: Tensor, **options: Any) -> Any:
    try:
        return ops.attention(*inputs, backend=backend, **options)
    except ValueError as refusal:
        if any(why in str(refusal) for why in ("not installed", "compute capability")):
            pytest.skip(str(refusal).splitlines()[-1])
        raise


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_kernels_of_others_are_as_accurate_as_plain_pytorch(backend: str, case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = dict(case)
    dtype, packed = case.get("dtype", torch.bfloat16), case.get("packed", False)
    heads, k_heads, q_len, k_len, dim = case.get("shape", (6, 2, 261, 261, 64))
    batch = 1 if packed else 2
    trains = backend != "fa3-fwd"
    strided = case.get("strided", False)
    inputs = [
        normal(batch, h, s, dim, dtype=dtype, strided=strided)
        for h, s in ((heads, q_len), (k_heads, k_len), (k_heads, k_len))
    ]
    if packed:
        with torch.no_grad():
            for t in inputs:
                t[:, :, CU[-1] :] = math.nan
    options: dict[str, Any] = {"mask": case.get("mask"), "softcap": case.get("softcap")}
    if case.get("sinks"):
        options["sinks"] = normal(1, 1, 1, heads, dtype=torch.float32).detach().flatten().requires_grad_()
    if case.get("bias"):
        options["bias"] = normal(batch, heads, q_len, k_len, dtype=dtype)
    if packed:
        options["cu_seqlens_q"] = torch.tensor(CU, dtype=torch.int32, device="cuda")
    leaves = [*inputs, *(options[n] for n in ("sinks", "bias") if n in options)]
    with torch.set_grad_enabled(trains):
        got = run_or_skip(backend, *inputs, **options)

    # Truth and plain see zeros where nobody looks, so that NaN cannot hide a leak of theirs.
    def others(change: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        own = [t.detach().nan_to_num(0).to(change).requires_grad_() for t in leaves]
        rest = iter(own[3:])
        return own, {n: next(rest) for n in ("sinks", "bias") if n in options}

    exact, exact_options = others(torch.float64)
    truth = ops.attention(*exact[:3], backend="reference", **(options | exact_options))
    own, own_options = others(dtype)
    mask = case.get("mask") or Full()
    mask = mask & Documents(CU) if packed else mask
    visible = mask.dense(q_len, k_len, device="cuda")
    simple = plain(*own[:3], visible, options["softcap"], own_options.get("bias"), own_options.get("sinks"))
    # PyTorch's own fp32 kernel sums its gradients in an order that costs it a little more than plain PyTorch's error.
    slack = 2.0 if backend == "sdpa" and dtype == torch.float32 else 1.0
    assert_as_accurate("out", got, simple, truth, slack=slack)
    if not trains:
        return
    weights = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, i, weights.to(o.dtype)) for o, i in ((got, leaves), (simple, own), (truth, exact))]
    for name, mine, theirs, true in zip(("dq", "dk", "dv", "d_extra"), *grads, strict=False):
        assert_as_accurate(name, mine, theirs.to(mine.dtype), true, slack=slack)


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-cudnn", "fa3-fwd", "flash-attn-4"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_logsumexp_is_that_of_the_reference(backend: str, packed: bool) -> None:
    if packed and backend.startswith("sdpa"):
        pytest.skip("has no packed sequences")
    q, k, v = (normal(1, h, 261, 64, dtype=torch.bfloat16).detach() for h in (6, 2, 2))
    options = {"cu_seqlens_q": torch.tensor(CU, dtype=torch.int32, device="cuda")} if packed else {}
    _, got = run_or_skip(backend, q, k, v, mask=Causal(), return_lse=True, **options)
    _, want = ops.attention(q, k, v, mask=Causal(), return_lse=True, backend="reference", **options)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-cudnn", "fa3-fwd", "flash-attn-4", "auto"])
def test_kernels_of_others_compile_without_a_graph_break(backend: str) -> None:
    inputs = [normal(2, h, 128, 64, dtype=torch.bfloat16) for h in (6, 2, 2)]
    trains = backend != "fa3-fwd"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, mask=Causal(), backend=backend)

    with torch.set_grad_enabled(trains):
        want = run_or_skip(backend, *inputs, mask=Causal())
        got = torch.compile(run, fullgraph=True)(*inputs)
        torch.testing.assert_close(got, want)
        if trains:
            weights = torch.randn_like(want)
            torch.testing.assert_close(
                torch.autograd.grad(got, inputs, weights),
                torch.autograd.grad(want, inputs, weights),
                rtol=2e-2,
                atol=2e-2,
            )


@pytest.mark.parametrize("backend", ["flash-attn-4", "sdpa-flash", "auto"])
def test_a_deterministic_backward_gives_equal_bits_on_a_gpu(backend: str) -> None:
    inputs = [normal(2, h, 1024, 64, dtype=torch.bfloat16) for h in (8, 2, 2)]
    weights = torch.randn(2, 8, 1024, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    try:
        torch.use_deterministic_algorithms(backend == "sdpa-flash")
        for _ in range(4):
            out = run_or_skip(backend, *inputs, mask=Causal(), deterministic=True)
            found.append(torch.autograd.grad(out, inputs, weights))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


def test_the_choice_says_where_it_comes_from() -> None:
    q, k, v = (normal(2, h, 256, 64, dtype=torch.bfloat16) for h in (6, 2, 2))
    name = torch.cuda.get_device_name()
    runs = [line for line in ops.explain(q, k, v, mask=Causal()).splitlines() if ": runs (" in line]
    assert len(runs) == 1 and name in runs[0]
    assert ("measured on" in runs[0]) == (name in choice._TABLES)
