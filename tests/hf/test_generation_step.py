"""A decoding step that can be captured: lengths on the device, kernels over the cache, no look at the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo import GQA, MLA, Linear, ops
from attnzoo.hf.generation import bridge, device, layer
from attnzoo.hf.generation.bridge import graphed
from attnzoo.hf.generation.build import _maker
from attnzoo.hf.generation.device import Clock, OnDevice
from attnzoo.hf.generation.graph import Step
from attnzoo.masks import Causal, GlobalTokens, SlidingWindow
from attnzoo.ops.decoding.store import store
from tests.hf.conftest import padding
from tests.hf.test_generation import NEW, cache_of, greedy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without one, kernels run under Triton's interpreter
KINDS = ("contiguous", "paged", "int8", "paged_int8", "rolling")
FIRST = "rolling, first tokens"
HELD, ROOM, WINDOW, PREFIX = (70, 3, 41), 90, 24, 5
pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained of this model")


def filled(kind: str, *, latent: bool = False, dtype: torch.dtype = torch.float32) -> tuple[OnDevice, Tensor]:
    """Rows of `HELD` tokens that count on the device, the next token written; and all keys, `[B, Hk, 71, D]`."""
    torch.manual_seed(0)
    heads, sizes = (1, (32, 16)) if latent else (2, (16, 16))
    k, v = (torch.randn(3, heads, max(HELD), size, device=DEVICE, dtype=dtype) for size in sizes)
    prefix = PREFIX if kind == FIRST else 0
    memory = _maker(kind.split(",")[0], 3, ROOM, WINDOW, prefix, latent=latent)(k, v)
    held = memory.stored()
    for part in (*held.k, *held.v):
        if part.is_floating_point():
            part.fill_(torch.nan)
    memory.append(k, v, torch.tensor(HELD))
    if kind.startswith("paged"):
        memory.reserve(4)
    device_side = OnDevice(memory, Clock(memory.row_lengths(), k.device), ROOM)
    new = [torch.randn(3, heads, 1, size, device=DEVICE, dtype=dtype) for size in sizes]
    device_side.write(*new)
    keys = torch.cat([k, new[0]], dim=2)
    for row, length in enumerate(HELD):
        keys[row, :, length] = new[0][row, :, 0]
    return device_side, keys


@pytest.mark.parametrize("kind", [*KINDS, FIRST])
def test_kernels_find_every_token_by_lengths_on_the_device(kind):
    device_side, _ = filled(kind)
    mask = SlidingWindow(WINDOW) if kind.startswith("rolling") else Causal()
    if kind == FIRST:
        mask = mask | (GlobalTokens(PREFIX) & Causal())
    q = torch.randn(3, 4, 1, 16, device=DEVICE)
    plain = ops.decode(q, device_side, mask=mask, starts=device_side.clock.before, backend="attention")
    got = ops.decode(q, device_side, mask=mask, starts=device_side.clock.before, backend="triton")
    assert plain.isfinite().all()
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8"])
def test_the_latent_kernel_does_too(kind):
    device_side, _ = filled(kind, latent=True)
    q = [torch.randn(3, 4, 1, size, device=DEVICE) for size in (32, 16)]
    options = {"scale": 0.2, "mask": Causal(), "starts": device_side.clock.before}
    plain = ops.latent_decode(*q, device_side, **options, backend="attention")
    got = ops.latent_decode(*q, device_side, **options, backend="triton")
    assert plain.isfinite().all()
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, FIRST])
def test_what_was_written_on_the_device_is_what_the_host_finds_afterwards(kind):
    device_side, keys = filled(kind)
    device_side.count(1)
    memory = device_side.memory
    assert memory.row_lengths() == [length + 1 for length in HELD]
    first = memory.first if isinstance(memory.first, Tensor) else torch.full((3,), memory.first)
    got = memory.view()[0]
    for row, length in enumerate(HELD):
        count = length + 1 - int(first[row])
        want = keys[row, :, int(first[row]) : length + 1].clone()
        want[:, : memory.prefix] = keys[row, :, : min(memory.prefix, count)]
        torch.testing.assert_close(got[row, :, :count], want, rtol=0, atol=0.02 if "int8" in kind else 0)


@pytest.mark.parametrize(
    ("kind", "latent"), [*((kind, False) for kind in (*KINDS, FIRST)), ("contiguous", True), ("paged_int8", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16])
def test_one_kernel_writes_what_plain_operations_do(kind, latent, dtype, monkeypatch):
    held = {}
    for fused in (True, False):
        monkeypatch.setattr(device, "store", partial(store, fused=fused))
        held[fused] = filled(kind, latent=latent, dtype=dtype)[0].stored()
    for one in ("k", "v"):
        pairs = list(zip(getattr(held[True], one), getattr(held[False], one), strict=True))
        pairs += [] if held[True].recent is None else [(getattr(half.recent, one)[0] for half in held.values())]
        for got, want in pairs:
            # PyTorch divides by 127 through its reciprocal on a GPU: the last bit of a scale, and with it a tie.
            exact = DEVICE == "cpu" or "int8" not in kind
            rtol, atol = (0, 0) if exact else (0, 1) if got.dtype == torch.int8 else (2**-22, 0)
            torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


class _Asked(TorchDispatchMode):
    """Notes operations whose result the host reads, or whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        picked = args[1] if name.startswith("aten.index") and isinstance(args[1], list | tuple) else ()
        if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in picked) or any(
            part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh", "masked_select")
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (GQA(num_kv_heads=2), "contiguous"),
        (GQA(num_kv_heads=2), "paged_int8"),
        (GQA(mask=SlidingWindow(5)), "rolling"),
        (GQA(mask=SlidingWindow(4) | (GlobalTokens(2) & Causal())), "rolling"),
        (MLA(kv_lora_rank=16), "paged"),
        (Linear(), "contiguous"),
        (Linear(feature_map="hedgehog", window=5), "contiguous"),
    ],
)
def test_a_step_asks_the_device_for_nothing(build, tokens, monkeypatch, spec, kind):
    model = attnzoo.swap(build("llama"), spec)
    cache = cache_of(model, kind)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
        step = Step(model, cache, choose=lambda logits: logits.argmax(-1))
        step.enter()
        # Kernels launch by themselves; what plain PyTorch on a CPU does in their place does not count.
        monkeypatch.setattr(layer.ops, "decode", lambda q, *args, **options: q)
        monkeypatch.setattr("attnzoo.hf.latent.ops.latent_decode", lambda q, *args, **options: q)
        monkeypatch.setattr("attnzoo.ops.linear.decoding.linear_step", lambda q, *args, **options: q)
        with _Asked() as asked:
            step()
    assert asked.found == []


def test_the_watch_for_questions_sees_them(tokens):
    with _Asked() as asked:
        bool(tokens.any())
        tokens[tokens > 3]
        torch.tensor([1, 2])
    assert len(asked.found) == 3


@pytest.mark.parametrize("name", ["gqa", "window", "mla", "linear", "hybrid"])
def test_transformers_generate_steps_through_the_stand_in(build, tokens, monkeypatch, name):
    spec, kind = {
        "gqa": (GQA(num_kv_heads=2), "paged_int8"),
        "window": (GQA(mask=SlidingWindow(5)), "rolling"),
        "mla": (MLA(kv_lora_rank=16), "contiguous"),
        "linear": (Linear(), "contiguous"),
        "hybrid": ([GQA(num_kv_heads=2), Linear(feature_map="hedgehog", window=5)], "contiguous"),
    }[name]
    monkeypatch.setattr(bridge, "_on_gpu", lambda tokens: True)
    calls = []
    run = Step._run
    monkeypatch.setattr(Step, "_run", lambda step: (calls.append(step), run(step)))
    model = attnzoo.swap(build("llama"), spec)
    mask = padding((12, 7, 9), 12, "left")
    want = greedy(model, tokens * mask, mask)
    cache = cache_of(model, kind)
    with graphed(model):
        assert torch.equal(greedy(model, tokens * mask, mask, past_key_values=cache), want)
    assert len(calls) == NEW - 1
    assert len(set(map(id, calls))) == 1
    assert cache.get_seq_length() == 12 + NEW - 1


def test_beams_and_second_turns_leave_the_stand_in_and_come_back(build, tokens, monkeypatch):
    monkeypatch.setattr(bridge, "_on_gpu", lambda tokens: True)
    model = attnzoo.swap(build("llama"), GQA(num_kv_heads=2))
    ones = torch.ones_like(tokens)
    with graphed(model):
        got = greedy(model, tokens, ones, num_beams=3, past_key_values=cache_of(model, rows=9))
        cache = attnzoo.hf.cache_for(model, 3, 40)
        first = greedy(model, tokens, ones, past_key_values=cache)
        more = torch.cat([first, tokens[:, :4]], dim=1)
        second = greedy(model, more, torch.ones_like(more), past_key_values=cache)
    assert torch.equal(got, greedy(model, tokens, ones, num_beams=3))
    assert torch.equal(second, greedy(model, more, torch.ones_like(more)))


def test_a_step_past_the_end_of_the_cache_is_refused(build, tokens):
    model = build("llama", implementation="attnzoo")
    cache = attnzoo.hf.cache_for(model, 3, 14)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
        step = Step(model, cache)
        step(tokens[:, :1])
        step(tokens[:, :1])
        with pytest.raises(ValueError, match="cache full: max_length is 14"):
            step(tokens[:, :1])
