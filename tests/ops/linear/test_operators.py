"""Linear attention's operators and steps: opcheck, torch.compile, states that are written in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.ops.linear import State
from attnzoo.ops.linear.chunked import linear_attention_chunks
from attnzoo.ops.linear.recurrent import linear_attention_step
from tests.ops.linear.inputs import close, draw, draw_state, gradients

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_operators_pass_opcheck() -> None:
    q, k, v = draw(4, 2, 9, 3, 2, batch=1)
    decay, lengths, ends = torch.tensor([-0.1, -0.2]), torch.tensor([7]), torch.tensor([0, 4, 8])
    for state, *rest in (
        (draw_state(1, 2, 3, 2), decay, lengths, None, "elu", True, 1.0, 4),
        (draw_state(2, 2, 3, 2, normalize=False), None, None, ends, "relu", True, 0.5, 4),
        (draw_state(1, 2, 3, 2), None, None, None, "identity", False, 1.0, 4),
    ):
        torch.library.opcheck(linear_attention_chunks, (q, k, v, *state, *rest))
    for normalize in (True, False):
        state = State(*(None if t is None else t.detach() for t in draw_state(1, 2, 3, 2, normalize)))
        tokens = [t.detach() for t in (q, k, v)]
        torch.library.opcheck(linear_attention_step, (*tokens, *state, decay, lengths, "elu", 1.0))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("padded", "chunked"), ("packed", "chunked"), ("bidirectional", "chunked"), ("bidirectional", "reference")],
)
def test_compiles_without_a_graph_break(kind: str, backend: str) -> None:
    q, k, v = draw(4, 2, 21, 4, 3, batch=1)
    options: dict[str, Any] = {
        "padded": {"key_lengths": torch.tensor([14]), "log_decay": torch.tensor([-0.1, -0.4])},
        "packed": {"cu_seqlens": torch.tensor([0, 9, 20])},
        "bidirectional": {"causal": False, "normalize": False},
    }[kind]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, **options, backend=backend)

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    close(got, want)
    close(gradients([got], [q, k, v]), gradients([want], [q, k, v]))


def test_a_step_writes_the_state_in_place_also_when_compiled() -> None:
    q, k, v = (t.detach() for t in draw(4, 2, 6, 3, 2))
    log_decay, lengths = torch.tensor([-0.1, -0.2]), torch.tensor([6, 4])
    state = State(*(t.detach() for t in draw_state(2, 2, 3, 2)))
    start = State(*(t.clone() for t in state))
    want, wanted = ops.linear_attention(
        q, k, v, log_decay=log_decay, key_lengths=lengths, initial_state=start, return_state=True, backend="reference"
    )
    torch._dynamo.reset()
    for step in (ops.linear_step, torch.compile(ops.linear_step, fullgraph=True, backend="aot_eager")):
        for held, first in zip(state, start, strict=True):
            held.copy_(first)
        close(step(q, k, v, state, log_decay=log_decay, lengths=lengths), want)
        close(list(state), list(wanted))
    before = state.s.clone()
    with pytest.raises(ValueError, match="linear_step cannot run this call: has no gradient"):
        ops.linear_step(q.requires_grad_(), k, v, state)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        ops.linear_step(q.detach(), k, v, state, feature_map="tanh")
    assert torch.equal(state.s, before)
