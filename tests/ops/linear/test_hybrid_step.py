"""The hybrid step against the fp64 reference over whole sequences, in PyTorch and in its kernel, which is interpreted
where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.caches import RecurrentStateCache
from attnzoo.ops.linear.stepping import hybrid_step
from attnzoo.ops.linear.triton.hybrid_step import hybrid_attention_triton_step
from tests.support.compare import assert_as_accurate

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # bf16 is wrong in the interpreter


def draw(heads: tuple[int, int], length: int, sizes: tuple[int, int, int], batch: int = 2) -> list[Tensor]:
    """Random q, k, v, features of both and near weights, in fp64; sizes of keys, features (0: the keys) and values."""
    generator = torch.Generator().manual_seed(length)
    dim, features, v_dim = sizes
    shapes = ((heads[0], dim), (heads[1], dim), (heads[1], v_dim), (heads[0], features), (heads[1], features))
    drawn = [torch.randn(batch, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    drawn[3:] = [t.softmax(-1) * features**0.5 for t in drawn[3:]] if features else drawn[:2]
    return [t.to(DEVICE) for t in [*drawn, torch.rand(heads[0], generator=generator, dtype=torch.float64) + 0.1]]


def cache_of(tokens: list[Tensor], window: int, feature_map: str, counts: list[int] | None = None) -> Any:
    """A cache after a prompt: the tokens given, row b's first `counts[b]`; all that it has not written is NaN."""
    _, k, v, _, f_k, _ = tokens
    own = f_k is not k
    options = {"feature_map": feature_map, "window": window, "dtype": v.dtype, "device": DEVICE}
    options |= {"key_dim": k.shape[3]} if own else {}
    cache = RecurrentStateCache(k.shape[0], k.shape[1], f_k.shape[3], v.shape[3], **options)
    for t in cache.ring:
        if t is not None:
            t.fill_(torch.nan)
    lengths = None if counts is None else torch.tensor(counts, device=DEVICE)
    cache.append(f_k, v, lengths, keys=k if own else None)
    return cache


def step(cache: Any, before: Tensor, tokens: list[Tensor], backend: str, **options: Any) -> Tensor:
    q, k, v, f_q, f_k, gain = tokens
    return hybrid_step(
        *(q, k, v, cache.state, cache.ring, before),
        q_features=None if f_q is q else f_q,
        k_features=None if f_k is k else f_k,
        near_weight=gain,
        feature_map=cache.feature_map,
        backend=backend,
        **options,
    )


def part(tokens: list[Tensor], low: int, high: int) -> list[Tensor]:
    cut = [t[:, :, low:high] for t in tokens[:5]]
    if tokens[3] is tokens[0]:
        cut[3:] = cut[:2]
    return [*cut, tokens[5]]


def cast(tokens: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """In a dtype, from fp16, so that all start alike."""
    found = [t.half().to(dtype) for t in tokens]
    if tokens[3] is tokens[0]:
        found[3:5] = found[:2]
    return found


def whole(tokens: list[Tensor], window: int, feature_map: str) -> Tensor:
    q, k, v, f_q, f_k, gain = tokens
    given = {"q_features": f_q, "k_features": f_k, "near_weight": gain, "feature_map": feature_map}
    return ops.hybrid_attention(q, k, v, window=window, **given, backend="reference")


CASES = [
    # heads, prompt, steps, sizes, window, feature_map
    ((6, 2), 9, (1,) * 9, (16, 32, 16), 8, "identity"),
    ((2, 2), 3, (1, 5, 4, 16, 1), (20, 0, 24), 7, "elu"),
    ((1, 1), 2, (1, 2, 1), (8, 8, 16), 1, "relu"),
    ((3, 1), 0, (2, 1, 1, 16), (16, 40, 5), 18, "identity"),
    ((20, 1), 40, (1, 1), (16, 0, 16), 20, "elu"),
]


@pytest.mark.parametrize("backend", ["plain", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_give_what_one_pass_over_all_tokens_would(case: Any, backend: str) -> None:
    heads, prompt, steps, sizes, window, feature_map = case
    tokens = draw(heads, prompt + sum(steps), sizes)
    truth = whole(cast(tokens, torch.float64), window, feature_map)
    for dtype in (torch.float32, HALF):
        mine = cast(tokens, dtype)
        plain = whole(mine, window, feature_map)
        cache = cache_of(part(mine, 0, prompt), window, feature_map)
        addresses = [t.data_ptr() for t in (*cache.state, *cache.ring) if t is not None]
        before = torch.full((2,), prompt, device=DEVICE)
        outs = []
        for count in steps:
            at = prompt + sum(o.shape[2] for o in outs)
            outs.append(step(cache, before, part(mine, at, at + count), backend))
            before += count
        assert addresses == [t.data_ptr() for t in (*cache.state, *cache.ring) if t is not None]
        assert_as_accurate("out", torch.cat(outs, 2), plain[:, :, prompt:], truth[:, :, prompt:])
        cache.advance(sum(steps), None)
        want = cache_of(part(mine, 0, prompt + sum(steps)), window, feature_map)
        for got, one in zip((*cache.state, *cache.tail[:3]), (*want.state, *want.tail[:3]), strict=True):
            torch.testing.assert_close(got, one, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_rows_of_any_lengths_step_together_and_nothing_unused_leaks(backend: str) -> None:
    counts, window = [0, 3, 30, 7], 8
    tokens = [t.float() for t in draw((4, 2), 34, (16, 24, 16), batch=4)]
    for row, count in enumerate(counts):
        for t in tokens[:5]:
            t[row, :, count:30] = torch.nan  # the padding of the prompt
    cache = cache_of(part(tokens, 0, 30), window, "elu", counts)
    before = torch.tensor(counts, device=DEVICE)
    new = part(tokens, 30, 34)
    real = torch.tensor([4, 2, 4, 0], device=DEVICE)
    for t in new[:5]:
        t[1, :, 2:], t[3] = torch.nan, torch.nan
    out = step(cache, before, new, backend, lengths=real)
    again = part(tokens, 32, 34)  # row 1 goes on
    before += real
    for t in again[:5]:
        t[1] = 0.25
    more = step(cache, before, again, backend, lengths=torch.tensor([0, 2, 0, 0], device=DEVICE))
    assert out.isfinite().all() and (out[1, :, 2:] == 0).all() and (out[3] == 0).all() and (more[[0, 2, 3]] == 0).all()
    for row, count in enumerate(counts[:3]):
        joined = [
            torch.cat([t[row : row + 1, :, :count], n[row : row + 1]], 2)
            for t, n in zip(tokens[:5], new[:5], strict=True)
        ]
        if row == 1:
            joined = [torch.cat([t[:, :, :5], n[1:2]], 2) for t, n in zip(joined, again[:5], strict=True)]
        want = whole([t.double() for t in [*joined, tokens[5]]], window, "elu")[0, :, count:].float()
        got = torch.cat([out[1, :, :2], more[1]], 1) if row == 1 else out[row]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert cache.state.s.isfinite().all() and cache.state.z.isfinite().all()


def test_the_operator_passes_opcheck_and_compiles_without_a_graph_break() -> None:
    tokens = [t.float() for t in draw((4, 2), 12, (16, 24, 16))]
    cache, new, before = cache_of(part(tokens, 0, 11), 8, "elu"), part(tokens, 11, 12), torch.full((2,), 11)
    before = before.to(DEVICE)
    memory = (*cache.state, *cache.ring)
    q, k, v, f_q, f_k, gain = new
    torch.library.opcheck(hybrid_attention_triton_step, (q, k, v, f_q, f_k, *memory, before, None, gain, "elu", 0.25))
    for backend in ("plain", "triton"):
        held = [cache_of(part(tokens, 0, 11), 8, "elu") for _ in range(2)]
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got, want = compiled(held[0], before, new, backend), step(held[1], before, new, backend)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(held[0].state, held[1].state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "backend must be 'auto', 'triton' or 'plain'"),
        ({"before": torch.zeros(3, dtype=torch.int64)}, r"before must be int32 or int64 \[2\]"),
        ({"near_weight": torch.ones(3)}, r"near_weight must be \[4\], got \[3\]"),
        ({"feature_map": "tanh"}, "feature_map must be one of"),
        ({"v": torch.ones(2, 2, 1, 8)}, r"s of the state must be \[2, 2, 24, 8\]"),
        ({"k_features": None, "q_features": None}, r"s of the state must be \[2, 2, 16, 16\]"),
        ({"q": torch.ones(2, 4, 1, 16, requires_grad=True)}, "has no gradient"),
        ({"length": 17}, "q and k must be of 1 to 16 tokens, got 17"),
        ({"q": torch.ones(2, 66, 1, 16), "q_features": torch.ones(2, 66, 1, 24)}, "takes 32 query heads a key head"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(change: dict[str, Any], message: str) -> None:
    length = change.get("length", 1)
    tokens = [t.float().cpu() for t in draw((4, 2), 5 + length, (16, 24, 16))]
    state_cache = RecurrentStateCache(2, 2, 24, 16, window=8, key_dim=16)
    held = [t.clone() for t in (*state_cache.state, *state_cache.ring)]
    q, k, v, f_q, f_k, _ = part(tokens, 5, 5 + length)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "q_features": f_q, "k_features": f_k, "backend": "triton"}
    given |= {"state": state_cache.state, "ring": state_cache.ring, "before": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        hybrid_step(**{**given, **{name: value for name, value in change.items() if name != "length"}})
    for t, old in zip((*state_cache.state, *state_cache.ring), held, strict=True):
        assert torch.equal(t, old)
