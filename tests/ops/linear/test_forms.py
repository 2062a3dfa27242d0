"""Linear attention, parallel, chunked and recurrent, against a loop over tokens: states, documents, padding."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo import ops
from attnzoo.ops.linear import State, chunked
from tests.ops.linear.inputs import close, draw, draw_state, gradients, in_loop
from tests.ops.naive_linear import all_to_all

pytestmark = pytest.mark.usefixtures("small_chunks")

FORMS = ["reference", "chunked", "recurrent"]
DECAY = {1: [0.7], 2: [0.9, 1.0], 3: [0.5, 0.99, 0.8]}


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (6, 3), (8, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "relu", "state": True},
        {"feature_map": "identity", "normalize": False, "scale": 0.3, "state": True},
        {"decay": True, "lengths": True, "state": True},
        {"decay": True, "normalize": False, "lengths": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_form_is_the_loop_over_tokens(heads: tuple[int, int], options: dict[str, Any]) -> None:
    options, normalize = dict(options), options.get("normalize", True)
    q, k, v = draw(*heads, 19, 5, 4)
    state = draw_state(2, heads[1], 5, 4, normalize) if options.pop("state", False) else None
    lengths = [11, 19] if options.pop("lengths", False) else None
    decay = DECAY[heads[1]] if options.pop("decay", False) else None
    want, want_s, want_z = in_loop(q, k, v, lengths or [19, 19], state, decay=decay, **options)
    inputs = [q, k, v, *(state or ())]
    wanted = [want, want_s, want_z if normalize else None]
    want_grads = gradients(wanted, inputs)
    for form in FORMS:
        with torch.set_grad_enabled(form != "recurrent"):
            out, new = ops.linear_attention(
                q,
                k,
                v,
                log_decay=None if decay is None else torch.tensor(decay, dtype=torch.float64).log(),
                key_lengths=None if lengths is None else torch.tensor(lengths),
                initial_state=state,
                return_state=True,
                backend=form,
                **options,
            )
        close([out, new.s], [want, want_s])
        assert (new.z is None) == (not normalize)
        if normalize:
            close(new.z, want_z)
        if form != "recurrent":
            close(gradients([out, *new], inputs), want_grads)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(0, 45), st.sampled_from([(1, 1), (4, 2)]), st.integers(0, 2**31), st.booleans())
def test_any_chunk_size_gives_the_same(chunk: int, length: int, heads: Any, seed: int, normalize: bool) -> None:
    q, k, v = draw(*heads, length, 4, 3, seed=seed)
    log_decay = torch.tensor(DECAY[heads[1]]).log()
    options = {"normalize": normalize, "log_decay": log_decay, "return_state": True}
    want, wanted = ops.linear_attention(q, k, v, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        out, state = ops.linear_attention(q, k, v, backend="chunked", **options)
        close([out, *state][: 2 + normalize], [want, *wanted][: 2 + normalize])
        close(gradients([out, *state], [q, k, v]), gradients([want, *wanted], [q, k, v]))
    turned = torch.tensor([1, 0])
    close(ops.linear_attention(q[turned], k[turned], v[turned], **options)[0], want[turned])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    close(ops.linear_attention(*strided, **options)[0], want)
    group = heads[0] // heads[1]
    many = {**options, "log_decay": log_decay.repeat_interleave(group)}
    close(ops.linear_attention(q, *(t.repeat_interleave(group, 1) for t in (k, v)), **many)[0], want)


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize(("q_len", "k_len"), [(13, 13), (5, 19), (11, 0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_without_causality_every_query_reads_every_key(form: str, q_len: int, k_len: int, normalize: bool) -> None:
    q, k, v = draw(6, 2, q_len, 5, 4, k_len=k_len)
    options = {"causal": False, "normalize": normalize, "backend": form}
    out = ops.linear_attention(q, k, v, **options)
    if k_len == 0:
        assert (out == 0).all()
        return
    want = torch.stack([all_to_all(*row, "elu", normalize, 5**-0.5) for row in zip(q, k, v, strict=True)])
    close(out, want)
    close(gradients([out], [q, k, v]), gradients([want], [q, k, v]))
    # Keys in two calls, the first's summed up: with gradients through the state.
    _, state = ops.linear_attention(q, k[:, :, :4], v[:, :, :4], **options, return_state=True)
    split = ops.linear_attention(q, k[:, :, 4:], v[:, :, 4:], **options, initial_state=state)
    close(split, want)
    close(gradients([split], [q, k, v]), gradients([want], [q, k, v]))
    short = ops.linear_attention(q, k, v, **options, key_lengths=torch.tensor([3, k_len]))
    close(short[0], all_to_all(q[0], k[0, :, :3], v[0, :, :3], "elu", normalize, 5**-0.5))


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_a_loop_over_documents(form: str, causal: bool) -> None:
    q, k, v = draw(4, 2, 40, 5, 3, batch=1)
    ends = [0, 3, 3, 30, 37]
    log_decay = torch.tensor([-0.2, -0.01]).double() if causal else None
    options = {"causal": causal, "log_decay": log_decay, "backend": form, "return_state": True}
    state = draw_state(4, 2, 5, 3)
    out, new = ops.linear_attention(q, k, v, cu_seqlens=torch.tensor(ends), initial_state=state, **options)
    loop = [
        ops.linear_attention(
            *(t[:, :, a:b] for t in (q, k, v)),
            initial_state=State(state.s[n : n + 1], state.z[n : n + 1]),
            **{**options, "backend": "reference"},
        )
        for n, (a, b) in enumerate(pairwise(ends))
    ]
    want = torch.cat([*(part for part, _ in loop), torch.zeros(1, 4, 3, 3, dtype=torch.float64)], dim=2)
    wanted = [torch.cat([each[i] for _, each in loop]) for i in range(2)]
    close([out, *new], [want, *wanted])
    inputs = [q, k, v, *state]
    close(gradients([out, *new], inputs), gradients([want, *wanted], inputs))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("case", ["padded", "packed", "bidirectional"])
def test_what_stands_in_padding_never_leaks(case: str, poison: float) -> None:
    q, k, v = draw(4, 2, 20, 4, 3, batch=1 if case == "packed" else 2)
    options: dict[str, Any] = {"key_lengths": torch.tensor([13, 0])}
    if case == "packed":
        options = {"cu_seqlens": torch.tensor([0, 6, 13])}
    if case == "bidirectional":
        options["causal"] = False
    else:
        options["log_decay"] = torch.tensor([-0.1, -0.5])
    for form in ["reference", "chunked"] + ["recurrent"] * (case == "padded"):
        with torch.set_grad_enabled(form != "recurrent"):
            clean, clean_state = ops.linear_attention(q, k, v, **options, return_state=True, backend=form)
            dirty = [t.detach().clone() for t in (q, k, v)]
            for t in dirty if case != "bidirectional" else dirty[1:]:
                t[0, :, 13:] = poison
                if case != "packed":
                    t[1] = poison
            dirty = [t.requires_grad_() for t in dirty]
            out, state = ops.linear_attention(*dirty, **options, return_state=True, backend=form)
        assert torch.equal(out, clean) and torch.equal(state.s, clean_state.s) and torch.equal(state.z, clean_state.z)
        if form != "recurrent":
            close(gradients([out, *state], dirty), gradients([clean, *clean_state], [q, k, v]))


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_no_key_answers_gives_zero_and_no_nan(form: str) -> None:
    q, k, v = draw(2, 1, 10, 4, 3)
    k = torch.cat([-k[:, :, :3].abs(), k[:, :, 3:]], dim=2).detach().requires_grad_()  # relu leaves nothing of them
    with torch.set_grad_enabled(form != "recurrent"):
        out = ops.linear_attention(q, k, v, feature_map="relu", backend=form)
    assert (out[:, :, :3] == 0).all() and out.isfinite().all() and out[:, :, 5:].abs().sum() > 0
    if form != "recurrent":
        for gradient in torch.autograd.grad(out.sum(), [q, k, v]):
            assert gradient.isfinite().all()
