"""Masks inside a kernel, against the masks themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.masks import (
    And,
    Blockwise,
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    Mask,
    Or,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    big_bird,
    longformer,
)

pytest.importorskip("triton")

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.kept import Kept
from attnzoo.ops.softmax.triton.patterns import classes_of, lower, reasons
from attnzoo.ops.softmax.triton.sees import sees

ROOT = Path(__file__).parents[3]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SIDE = 32  # of the kernel's one tile

SINGLE = [
    Full(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(3, ahead=4),
    SlidingWindow(1 << 40, ahead=1 << 40),
    Dilated(4, 3),
    Dilated(3, 4, ahead=2),
    Dilated(1 << 40, 1 << 20),
    Documents([0, 3, 3, 4, 11, 19]),
    Documents([0, 0]),
    Documents([0, 5, 500]),
    GlobalTokens(3),
    GlobalTokens(0),
    GlobalTokens((0, 4, 5, 17, 900)),
    RandomBlocks(2, 3),
    RandomBlocks(0, 3),
    RandomBlocks(3, 1, seed=7, near=1, edge=1),
    RandomBlocks(2, 4, length=23),
    RandomBlocks(2, 1 << 40),
    Blockwise(SlidingWindow(2, ahead=1), 3),
    Blockwise(Causal(), 8),
    Blockwise(Documents([0, 2, 5]), 4),
    Blockwise(Blockwise(GlobalTokens((1,)), 2), 3),
]
NESTED = [
    Documents([0, 7, 20]) & Causal(),
    (SlidingWindow(3) | GlobalTokens(2)) & Causal() & Documents([0, 9, 23]),
    Dilated(3, 5) | (GlobalTokens((6,)) & Full()),
    Documents([0, 9, 23]) | Documents([0, 4, 30]),
    Blockwise((Dilated(2, 2) | RandomBlocks(1, 2)) & Causal(), 2),
    longformer(6, (0, 9)),
    big_bird(4, random=2),
    big_bird(4, random=2, length=28),
]
BY_HEAD = [
    PerHead([SlidingWindow(4), Dilated(4, 2), Dilated(4, 2), Full()]),
    PerHead([big_bird(4, random=2, seed=seed) for seed in range(3)]),
    PerHead([GlobalTokens(1), GlobalTokens((3, 4)), Causal()]) & Documents([0, 6, 6, 21]),
    Documents([0, 6, 21]) | Blockwise(PerHead([RandomBlocks(1, 1), Causal(), RandomBlocks(2, 1)]), 3),
    PerHead([Causal(), Full()]) & PerHead([SlidingWindow(2), GlobalTokens(5)]),
    PerHead([GlobalTokens(2), GlobalTokens(2)]),
]
ALL = [*SINGLE, *NESTED, *BY_HEAD]


@triton.jit
def write(out, tables, first, rows, columns, PROGRAM: tl.constexpr, SIDE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Each head's mask, [rows, columns], whose queries start at position `first`; in a tile of queries and keys."""
    head = tl.program_id(0)
    if KEYS_FIRST:
        row = tl.arange(0, SIDE)[None, :]
        column = tl.arange(0, SIDE)[:, None]
    else:
        row = tl.arange(0, SIDE)[:, None]
        column = tl.arange(0, SIDE)[None, :]
    seen = sees(PROGRAM, tables, head, first + row, column)
    at = out + (head * rows + row) * columns + column
    tl.store(at, seen.to(tl.int8), mask=(row < rows) & (column < columns))


def assert_same(mask: Mask, q_len: int, k_len: int, keys_first: bool = False) -> None:
    heads = mask.heads or 2
    program, tables = lower(mask, heads, q_len, k_len, DEVICE)
    out = torch.full((heads, q_len, k_len), -1, dtype=torch.int8, device=DEVICE)
    write[(heads,)](out, tables, k_len - q_len, q_len, k_len, program, SIDE, keys_first)
    assert torch.equal(out, mask.dense(q_len, k_len, device=DEVICE).to(torch.int8).expand_as(out))


@pytest.mark.parametrize("mask", ALL, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(23, 23), (7, 31), (29, 13)])
def test_a_kernel_sees_what_the_mask_says(mask: Mask, q_len: int, k_len: int) -> None:
    assert_same(mask, q_len, k_len)


@pytest.mark.parametrize("mask", ALL, ids=str)
def test_a_tile_may_stand_with_its_keys_first(mask: Mask) -> None:
    assert_same(mask, 29, 23, keys_first=True)


def one_head() -> st.SearchStrategy[Mask]:
    lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    small, length = st.integers(0, 3), st.one_of(st.none(), st.integers(1, 24))
    single = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(SlidingWindow, st.integers(1, 12), st.integers(0, 5)),
        st.builds(Dilated, st.integers(1, 5), st.integers(1, 5), small),
        lengths.map(lambda n: Documents([0, *torch.tensor(n).cumsum(0).tolist()])),
        st.builds(GlobalTokens, st.one_of(small, st.lists(st.integers(0, 25), max_size=5))),
        st.builds(RandomBlocks, small, st.integers(1, 5), st.integers(0, 2**40), length, small, small),
    )
    return st.recursive(single, nested, max_leaves=4)


def nested(masks: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    return st.one_of(
        st.builds(And, masks, masks), st.builds(Or, masks, masks), st.builds(Blockwise, masks, st.integers(1, 5))
    )


def any_mask() -> st.SearchStrategy[Mask]:
    by_head = st.lists(one_head(), min_size=3, max_size=3).map(PerHead)
    return st.one_of(one_head(), by_head, nested(st.one_of(by_head, one_head())))


@settings(max_examples=10 if ON_GPU else 80, deadline=None)
@given(any_mask(), st.integers(1, SIDE), st.integers(1, SIDE), st.booleans())
def test_a_kernel_sees_what_any_mask_says(mask: Mask, q_len: int, k_len: int, keys_first: bool) -> None:
    assert_same(mask, q_len, k_len, keys_first)


@pytest.mark.parametrize(
    ("mask", "other"),
    [
        (Documents([0, 4, 9]) & Causal(), Documents([0, 1, 1, 2, 31]) & Causal()),
        (longformer(4, (0, 3), dilation=2), longformer(4, (2, 8, 9), dilation=2)),
        (RandomBlocks(2, 4, seed=1), RandomBlocks(2, 4, seed=2, length=16, near=1)),
        (PerHead([GlobalTokens(1), Full()]), PerHead([GlobalTokens(6), Full()])),
    ],
    ids=str,
)
def test_new_data_and_lengths_never_compile_a_kernel_again(mask: Mask, other: Mask) -> None:
    program, tables = lower(mask, 2, 16, 16, DEVICE)
    again, others = lower(other, 2, 16, 16, DEVICE)
    assert program == again and hash(program) == hash(again)
    assert not torch.equal(tables, others)
    assert lower(mask, 2, 5, 2900, DEVICE).program == program


def test_heads_that_differ_in_their_data_alone_share_a_program() -> None:
    mask = PerHead([big_bird(4, seed=seed) for seed in range(6)] + [Causal()])
    name, programs = lower(mask, 7, 32, 32, DEVICE).program
    assert name == "per_head" and len(programs) == 2


def test_heads_of_the_same_mask_are_one_class() -> None:
    documents = Documents([0, 3, 8])
    by_head = PerHead([Causal(), Full(), Causal()])
    classes, class_of_head = classes_of(documents & Blockwise(by_head, 2))
    assert class_of_head == [0, 1, 0]
    assert classes == [documents & Blockwise(Causal(), 2), documents & Blockwise(Full(), 2)]
    assert classes_of(documents) == ([documents], [0])


@dataclass(frozen=True)
class Even(Mask):
    """A pattern that no kernel knows."""

    pattern: ClassVar[str] = "even"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i + j) % 2 == 0


@pytest.fixture
def _forget_even():
    yield
    Mask.patterns.pop("even", None)


@pytest.mark.usefixtures("_forget_even")
def test_a_mask_that_no_kernel_knows_is_refused_with_a_reason() -> None:
    for mask in (Even(), Causal() & Even(), Blockwise(Even() | Even(), 2), PerHead([Even(), Full()])):
        assert reasons(mask) == ["cannot evaluate mask 'even' in a kernel"]
        with pytest.raises(TypeError, match="even"):
            lower(mask, 2, 8, 8, DEVICE)
    assert not any(reasons(mask) for mask in ALL)


def test_a_pattern_is_made_once() -> None:
    first = lower(Documents([0, 4, 9]), 2, 16, 16, DEVICE)
    assert lower(Documents(torch.tensor([0, 4, 9])), 2, 16, 16, DEVICE) is first
    assert lower(Documents([0, 4, 9]), 2, 1, 17, DEVICE) is first  # and not for each length that a cache grows to


def test_a_pattern_is_made_on_the_host_in_any_mode_and_can_be_saved_for_a_backward() -> None:
    with torch.device("meta"), torch.inference_mode():
        tables = lower(RandomBlocks(2, 3, seed=99), 2, 16, 16, DEVICE).tables
    assert tables.device == DEVICE and not tables.is_inference()


def test_only_the_latest_values_are_kept() -> None:
    kept: Kept[tuple[int, ...]] = Kept(2)
    made = []

    def ask(key: int) -> None:
        assert kept.get(key, torch.device("cpu"), lambda: (made.append(key), key)[1:]) == (key,)

    for key in (1, 2, 1, 3, 1, 2):  # 2 was asked for longest ago when 3 came
        ask(key)
    assert made == [1, 2, 3, 2]


def test_nothing_is_made_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        lower(Documents([0, 7]), 2, 16, 16, torch.device("cuda", 0))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_another_stream_waits_for_the_tables() -> None:
    kept: Kept[tuple[torch.Tensor]] = Kept(1)

    def slowly() -> tuple[torch.Tensor]:
        torch.cuda._sleep(100_000_000)
        return (torch.full((1024,), 5, device=DEVICE),)

    kept.get(0, DEVICE, slowly)
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        (value,) = kept.get(0, DEVICE, slowly)
        copy = value.clone()
    torch.cuda.synchronize()
    assert bool((copy == 5).all())


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_what_a_cuda_graph_reads_outlives_the_latest_values() -> None:
    kept: Kept[tuple[torch.Tensor]] = Kept(1)
    value = kept.get(0, DEVICE, lambda: (torch.full((1024,), 5, device=DEVICE),))[0]
    out = torch.zeros(1024, dtype=value.dtype, device=DEVICE)
    del value
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(kept.get(0, DEVICE, lambda: (out,))[0])
    others = [kept.get(key, DEVICE, lambda: (torch.full((1024,), 6, device=DEVICE),)) for key in range(1, 9)]
    graph.replay()
    assert len(others) == 8 and bool((out == 5).all())


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.ops.softmax.test_triton_patterns import SIDE, write

def nested(part):
    return tuple(map(nested, part)) if isinstance(part, list) else part

types = {"out": "*i8", "tables": "*i32", "first": "i32", "rows": "i32", "columns": "i32"}
for program in json.loads(sys.argv[1]):
    for keys_first in (False, True):
        constants = {"PROGRAM": nested(program), "SIDE": SIDE, "KEYS_FIRST": keys_first}
        triton.compile(ASTSource(write, types, constants), target=GPUTarget("cuda", 90, 32))
"""


def test_every_pattern_compiles_for_a_gpu() -> None:
    masks = [*NESTED, *BY_HEAD[:2], PerHead([Dilated(2, 3), Full(), Blockwise(Causal(), 8)])]
    programs = [lower(mask, mask.heads or 2, 16, 16, DEVICE).program for mask in masks]
    text = json.dumps(programs)
    for name in ("full", "causal", "sliding_window", "documents", "every", "first_tokens", "global_tokens"):
        assert f'"{name}"' in text
    for name in ("stretch", "random_blocks", "blockwise", "and", "or", "per_head"):
        assert f'"{name}"' in text
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(programs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
