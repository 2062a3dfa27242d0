"""The choice of a backend: measured orders, plans for repeated calls, what it says, and what it costs."""

from __future__ import annotations

import json
import timeit
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Documents, Full, SlidingWindow
from attnzoo.ops.softmax import choice, common, cudnn, fa3, flash, flash4, plans
from attnzoo.ops.softmax.backends import BACKENDS as ALL
from attnzoo.ops.softmax.backends import choose
from attnzoo.ops.softmax.choice import Class


def draw(heads=4, k_heads=2, q_len=8, k_len=8, dim=16, *, batch=2, dtype=torch.float32) -> list[Tensor]:
    shapes = ((heads, q_len, dim), (k_heads, k_len, dim), (k_heads, k_len, dim))
    return [torch.randn(batch, *s).to(dtype) for s in shapes]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[common.Call]:
    """A backend "spy" that takes every call, gives zeros and remembers what it was asked."""
    calls: list[common.Call] = []

    def run(call: common.Call) -> tuple[Tensor, None]:
        calls.append(call)
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1]), None

    monkeypatch.setitem(ALL, "spy", SimpleNamespace(reasons=lambda call: [], run=run))
    return calls


def test_repeated_calls_are_checked_and_chosen_once(monkeypatch, asked) -> None:
    looked = []
    monkeypatch.setattr(plans, "choose", lambda call, backend: looked.append(call) or ALL["spy"])
    monkeypatch.setattr(plans, "PLANS", {})
    q, k, v = draw()
    for _ in range(3):
        ops.attention(q, k, v, mask=SlidingWindow(8), scale=0.5, backend="spy")
    assert len(looked) == 1 and len(asked) == 3
    assert asked[0]._replace(q=None, k=None, v=None) == asked[2]._replace(q=None, k=None, v=None)
    assert asked[2].mask == Causal()  # the window is as wide as there are keys: the plan remembers the plain form


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(2, 4, 7, 16)},
        {"q": torch.randn(2, 4, 8, 16).requires_grad_()},
        {"mask": SlidingWindow(3)},
        {"mask": None},
        {"mask": torch.ones(8, 8, dtype=torch.bool)},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"dropout_p": 0.5},
        {"sinks": torch.zeros(4)},
        {"bias": torch.zeros(8, 8)},
        {"bias": torch.zeros(1, 8)},
        {"bias": torch.zeros(8, 8).requires_grad_()},
        {"alibi_slopes": torch.zeros(4)},
        {"key_lengths": torch.tensor([3, 4])},
        {"return_lse": True},
        {"deterministic": True},
        {"backend": "tiled"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_call_of_another_signature_is_never_run_by_an_old_plan(monkeypatch, change) -> None:
    q, k, v = draw()
    monkeypatch.setattr(plans, "PLANS", {})
    ops.attention(q, k, v, mask=Causal())
    chosen = []
    monkeypatch.setattr(plans, "choose", lambda call, backend: chosen.append(call) or choose(call, backend))
    arguments = {"q": q, "mask": Causal()} | change
    ops.attention(arguments.pop("q"), k, v, **arguments)
    assert len(chosen) == 1


def test_values_of_lengths_and_boundaries_are_checked_every_time() -> None:
    q, k, v = draw()
    ops.attention(q, k, v, key_lengths=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"key_lengths must be in \[0, 8\], got \[3, 9\]"):
        ops.attention(q, k, v, key_lengths=torch.tensor([3, 9]))
    q, k, v = draw(batch=1)
    ops.attention(q, k, v, cu_seqlens_q=torch.tensor([0, 3]), backend="tiled")
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0, never fall and end by 8"):
        ops.attention(q, k, v, cu_seqlens_q=torch.tensor([0, 9]), backend="tiled")


def test_a_repeated_call_computes_with_its_own_tensors_and_dtype() -> None:
    q, k, v = draw()
    for _ in range(2):
        for mask in (torch.rand(8, 8) < 0.7, torch.rand(8, 8) < 0.7):
            got = ops.attention(q, k, v, mask=mask, backend="tiled")
            torch.testing.assert_close(got, ops.attention(q, k, v, mask=mask, backend="reference"))
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.attention(q, k, v).dtype == torch.bfloat16
            mixed = ops.attention(q.bfloat16(), k, v.half(), mask=Causal(), backend="tiled")
            assert torch.equal(
                mixed, ops.attention(q.bfloat16(), k, v.half().bfloat16(), mask=Causal(), backend="tiled")
            )
        assert ops.attention(q, k, v).dtype == torch.float32


def test_determinism_wished_for_by_the_program_reaches_the_backend(asked) -> None:
    q, k, v = draw()
    ops.attention(q, k, v, backend="spy")
    torch.use_deterministic_algorithms(True)
    try:
        ops.attention(q, k, v, backend="spy")
    finally:
        torch.use_deterministic_algorithms(False)
    ops.attention(q, k, v, backend="spy")
    assert [call.deterministic for call in asked] == [False, True, False]


def test_symbolic_lengths_are_planned_afresh() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = draw()
    graph = make_fx(lambda q, k, v: ops.attention(q, k, v, mask=Causal()), tracing_mode="symbolic")(q, k, v)
    torch.testing.assert_close(graph(q, k, v), ops.attention(q, k, v, mask=Causal()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_the_automatic_choice_and_a_plan_from_before(dynamic) -> None:
    inputs = [t.requires_grad_() for t in draw()]
    ops.attention(*inputs, mask=Causal())
    run = torch.compile(
        lambda q, k, v: ops.attention(q, k, v, mask=Causal()), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for q_len in (8, 12):
        inputs = [t.requires_grad_() for t in draw(q_len=q_len, k_len=q_len)]
        torch.testing.assert_close(run(*inputs), ops.attention(*inputs, mask=Causal()))


def on_cuda(q, k, v, **options) -> common.Call:
    """The call as it would be on a GPU, for what the choice asks of it: device, shapes, dtypes."""

    class There:
        def __init__(self, t: Tensor) -> None:
            self.t = t
            self.device = torch.device("cuda", 0)

        def __getattr__(self, name: str):
            return getattr(self.t, name)

    mask = options.pop("mask", Full())
    return common.Call(There(q), There(k), There(v), mask, 1.0, **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, Class(False, "full", 64, 256, True)),
        ({"mask": Causal(), "k_len": 2049, "dim": 65}, Class(False, "causal", 128, 4096, True)),
        ({"mask": SlidingWindow(3), "k_len": 2048, "dim": 128, "heads": 2}, Class(False, "window", 128, 1024, False)),
        ({"mask": Dilated(3, 2), "k_len": 513, "grad": True}, Class(True, "sparse", 64, 1024, True)),
        ({"mask": Causal(), "softcap": 3.0, "dim": 576}, Class(False, "softcap", 256, 256, True)),
        ({"mask": Causal(), "sinks": torch.zeros(4)}, Class(False, "sinks", 64, 256, True)),
        ({"mask": Causal(), "cu_seqlens_q": torch.tensor([0, 3])}, Class(False, "packed", 64, 256, True)),
        ({"mask": Documents([0, 3]), "k_len": 100_000}, Class(False, "sparse", 64, 65536, True)),
    ],
)
def test_calls_fall_into_classes(options, wanted) -> None:
    shape = {name: options.pop(name) for name in ("heads", "k_len", "dim") if name in options}
    q, k, v = draw(batch=1, **shape)
    q.requires_grad_(options.pop("grad", False))
    assert choice.class_of(on_cuda(q, k, v, **options)) == wanted
    assert choice.read({"x": {"orders": {wanted.text: ["sdpa"]}}}) == {"x": {wanted: ("sdpa",)}}


def test_a_measured_device_takes_the_order_of_the_nearest_class(monkeypatch) -> None:
    orders = {
        "forward causal d128 s4096 grouped": ["b", "a"],
        "forward causal d128 s1024 grouped": ["c"],
        "forward causal d64 s4096 grouped": ["d"],
        "training causal d128 s4096 grouped": ["e"],
    }
    monkeypatch.setattr(choice, "_TABLES", choice.read({"Known GPU": {"orders": orders}}))
    monkeypatch.setattr(choice, "capability", lambda index: (9, 0))
    monkeypatch.setattr(choice, "device_name", lambda index: "Known GPU")

    def order(k_len, dim, heads=4, mask=Causal(), grad=False):
        q, k, v = draw(heads=heads, k_len=k_len, dim=dim, batch=1)
        return choice.order(on_cuda(q.requires_grad_(grad), k, v, mask=mask))

    first, source = order(4096, 128)
    assert first[:2] == ("b", "a") and source == "measured on Known GPU: forward causal d128 s4096 grouped"
    assert set(first) >= {"triton", "tiled", "sdpa", "flash-attn-4"}, "what was not measured comes after"
    assert order(65536, 128)[0][0] == "b" and order(16, 128)[0][0] == "c"
    assert order(4096, 128, heads=2)[0][0] == "b"
    assert order(1024, 64)[0][0] == "d", "head_dim weighs more than length"
    assert order(4096, 128, grad=True)[0][0] == "e"
    assert order(4096, 128, mask=SlidingWindow(3)) == (choice._ON_HOPPER, "the default order for Known GPU")
    monkeypatch.setattr(choice, "device_name", lambda index: "Another GPU")
    monkeypatch.setattr(choice, "capability", lambda index: (8, 0))
    assert order(4096, 128)[0][0] == "sdpa-flash"


def test_the_packaged_table_names_backends_and_classes_that_exist() -> None:
    tables = json.loads(choice.TABLE.read_text())
    assert choice.read(tables) == choice._TABLES
    for table in choice._TABLES.values():
        assert all(set(backends) <= set(ALL) for backends in table.values())
        assert {c.kind for c in table} <= {"full", "causal", "window", "packed", "softcap", "sinks", "sparse"}
    for order in (choice._ON_CPU, choice._ON_HOPPER, choice._ON_AMPERE, choice._ELSEWHERE):
        assert set(order) <= set(ALL) and order[-1] == "tiled", "the last one takes every call"


BACKENDS = {"sdpa-flash": flash, "sdpa-cudnn": cudnn, "fa3-fwd": fa3, "flash-attn-4": flash4}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100 with every package installed."""
    for module in BACKENDS.values():
        monkeypatch.setattr(module, "capability", lambda index: (9, 0))
    for module in (fa3, flash4):
        monkeypatch.setattr(module, "installed", lambda: True)
        monkeypatch.setattr(module, "refusal", lambda: "")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, {}),
        ({"grad": True}, {"fa3-fwd": "has no backward"}),
        ({"dtype": torch.float16}, {"fa3-fwd": "is built without fp16"}),
        ({"dtype": torch.float32}, dict.fromkeys(BACKENDS, "runs fp16 and bf16 only")),
        ({"mask": Dilated(2, 2)}, dict.fromkeys(BACKENDS, "has full, causal and sliding-window masks only")),
        (
            {"mask": SlidingWindow(3)},
            {"sdpa-cudnn": "has full and causal masks only", "fa3-fwd": "is built without sliding windows"},
        ),
        ({"softcap": 2.0}, {"sdpa-flash": "has no softcap", "sdpa-cudnn": "has no softcap"}),
        ({"sinks": torch.zeros(4)}, dict.fromkeys(("sdpa-flash", "sdpa-cudnn", "fa3-fwd"), "has no sinks")),
        ({"bias": torch.zeros(8, 8)}, dict.fromkeys(BACKENDS, "has no bias")),
        ({"alibi_slopes": torch.zeros(4)}, dict.fromkeys(BACKENDS, "has no ALiBi")),
        ({"key_lengths": torch.tensor([3, 4])}, dict.fromkeys(BACKENDS, "has no key_lengths")),
        (
            {"dropout_p": 0.1},
            dict.fromkeys(("sdpa-cudnn", "fa3-fwd", "flash-attn-4"), "has no dropout"),
        ),
        (
            {"grad": True, "deterministic": True},
            {
                "sdpa-flash": "is deterministic only under",
                "sdpa-cudnn": "is not deterministic",
                "fa3-fwd": "has no backward",
            },
        ),
        ({"deterministic": True}, {}),
        ({"return_lse": True}, {}),
        (
            {"return_lse": True, "grad": True},
            {
                "sdpa-flash": "no gradient of the logsumexp",
                "sdpa-cudnn": "no gradient of the logsumexp",
                "fa3-fwd": "has no backward",
            },
        ),
        ({"mask": Causal(), "k_len": 11}, {"sdpa-cudnn": "aligns causal masks top left"}),
        (
            {"mask": Causal(), "k_len": 5},
            {
                "sdpa-flash": "queries before the first key",
                "sdpa-cudnn": "aligns causal masks top left",
                "flash-attn-4": "queries before the first key",
            },
        ),
        ({"k_len": 0}, dict.fromkeys(BACKENDS, "has no kernel for empty tensors")),
        ({"dim": 20}, dict.fromkeys(BACKENDS, "multiple")),
        ({"dim": 192}, {"sdpa-cudnn": "a multiple of 8 up to 128"}),
        ({"dim": 264}, dict.fromkeys(BACKENDS, "up to")),
    ],
    ids=str,
)
def test_kernels_of_others_refuse_what_they_do_not_have(hopper, options, refused) -> None:
    shape = {name: options.pop(name) for name in ("k_len", "dim") if name in options}
    q, k, v = draw(dtype=options.pop("dtype", torch.bfloat16), **shape)
    q.requires_grad_(options.pop("grad", False))
    found = {name: module.reasons(on_cuda(q, k, v, **options)) for name, module in BACKENDS.items()}
    assert {name for name, why in found.items() if why} == set(refused)
    for name, why in refused.items():
        assert why in "; ".join(found[name])


def test_a_package_that_is_not_there_or_broken_is_a_reason(monkeypatch, hopper) -> None:
    call = on_cuda(*draw(dtype=torch.bfloat16))
    monkeypatch.setattr(fa3, "installed", lambda: False)
    assert fa3.reasons(call) == ["the package fa3-fwd is not installed"]
    monkeypatch.setattr(flash4, "refusal", lambda: "does not import: ImportError: no quack")
    assert flash4.reasons(call) == ["does not import: ImportError: no quack"]


@pytest.mark.serial
def test_checks_and_choice_cost_a_few_microseconds_a_call(asked) -> None:
    q, k, v = draw()
    sinks = torch.zeros(4)

    def bare() -> Tensor:
        return q.new_zeros(*q.shape[:3], v.shape[-1])

    def call() -> Tensor:
        asked.clear()
        return ops.attention(q, k, v, mask=Causal(), sinks=sinks, backend="spy")

    call()
    ours, theirs = (min(timeit.repeat(f, number=300, repeat=15)) / 300 for f in (call, bare))
    assert ours - theirs < 30e-6  # 3 to 6 on an idle core; three times the promise for one that is not


def test_a_package_that_was_not_measured_keeps_the_place_that_it_is_expected_to_have() -> None:
    expected = ("fa3-fwd", "flash-attn-4", "sdpa-cudnn", "triton", "sdpa-flash", "tiled")
    assert choice.merged(("triton", "sdpa-cudnn"), expected) == (
        *("fa3-fwd", "flash-attn-4", "triton", "sdpa-cudnn"),
        *("sdpa-flash", "tiled"),
    )
    assert choice.merged((), expected) == expected
    assert choice.merged(("tiled", "fa3-fwd"), expected)[0] == "flash-attn-4"
