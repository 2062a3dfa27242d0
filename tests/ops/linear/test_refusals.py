"""What linear attention refuses, and what it explains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnzoo import ops
from tests.ops.linear.inputs import close, draw

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_explain_names_the_choice_and_every_reason() -> None:
    q, k, v = draw(2, 1, 8, 4, 4)
    first, *rest = ops.explain_linear(q, k, v).splitlines()
    assert first.startswith("triton: ") and first.endswith("has no fp64")  # perhaps also that it needs a GPU
    assert rest == [
        "recurrent: has no gradient",
        "chunked: runs",
        "reference: quadratic in memory, runs only when asked for",
    ]
    with torch.no_grad():
        assert ops.explain_linear(q, k, v).splitlines()[1] == "recurrent: could run, is slower"
        one = [t[:, :, :1] for t in (q, k, v)]
        assert ops.explain_linear(*one).splitlines()[1:3] == ["recurrent: runs", "chunked: could run, is slower"]
        close(ops.linear_attention(*one), ops.linear_attention(*one, backend="chunked"))
    with pytest.raises(ValueError, match="no backend can run this call\nrecurrent: is causal; has no gradient"):
        ops.linear_attention(q, k, v, causal=False, backend="recurrent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, r"q, k and v must be \[B, H, S, D\]"),
        ({"k": torch.ones(2, 2, 6, 5)}, r"q must be \[B, Hq, Sq, D\]"),
        ({"k": torch.ones(2, 3, 6, 8), "v": torch.ones(2, 3, 6, 8)}, "the key heads of k must divide"),
        ({"q": torch.ones(2, 4, 6, 8).half()}, "q and k must have one floating-point dtype, got torch.float16"),
        ({"v": torch.ones(2, 2, 6, 8).double()}, "v must be fp64 exactly where k is"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"scale": 0.0}, "scale must be finite and not 0, got 0.0"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"log_decay": torch.zeros(4)}, r"log_decay must be \[2\] floating point, got \[4\]"),
        ({"log_decay": torch.tensor([0.1, 0.0])}, "log_decay must be finite and at most 0"),
        ({"log_decay": torch.zeros(2, requires_grad=True)}, "log_decay must not require a gradient"),
        ({"log_decay": torch.zeros(2), "causal": False}, "log_decay needs causal=True"),
        ({"q": torch.ones(2, 4, 5, 8)}, "causal and packed calls need as many queries as keys, got 5 and 6"),
        ({"key_lengths": torch.tensor([1, 7])}, r"key_lengths must be in \[0, 6\], got \[1, 7\]"),
        ({"key_lengths": torch.tensor([1])}, r"key_lengths must be \[2\]"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "key_lengths must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "packed sequences need a batch of 1"),
        ({"cu_seqlens": torch.tensor([0, 6]), "key_lengths": torch.tensor([1, 6])}, "exclude each other"),
        ({"initial_state": (torch.zeros(2, 2, 8, 8), None)}, "initial_state must have z exactly where normalize"),
        ({"initial_state": (torch.zeros(2, 4, 8, 8), torch.zeros(2, 2, 8))}, r"s of initial_state must be \[2, 2, 8"),
        ({"initial_state": (torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8).half())}, "z of initial_state must be"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"q": torch.ones(2, 4, 6, 8), "k": torch.ones(2, 2, 6, 8), "v": torch.ones(2, 2, 6, 8)}
    call |= change
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("ends", [[1, 4], [0, 4, 3], [0, 7], [0]], ids=str)
def test_bad_boundaries_are_refused_by_name(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must"):
        ops.linear_attention(*[torch.ones(1, 2, 6, 8)] * 3, cu_seqlens=torch.tensor(ends))
