"""Linear attention: parallel, chunked and recurrent against a loop over tokens; states, documents, padding, memory."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import ops
from attnzoo.ops.linear import State, chunked
from attnzoo.ops.linear.chunked import linear_attention_chunks
from attnzoo.ops.linear.recurrent import linear_attention_step
from tests.ops.naive_linear import MAPS, all_to_all, token_by_token
from tests.support.compare import assert_as_accurate

FORMS = ["reference", "chunked", "recurrent"]
DECAY = {1: [0.7], 2: [0.9, 1.0], 3: [0.5, 0.99, 0.8]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens, so that short sequences have several."""
    monkeypatch.setattr(chunked, "CHUNK", 8)


def draw(
    q_heads: int,
    k_heads: int,
    length: int,
    dim: int,
    v_dim: int,
    batch: int = 2,
    k_len: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Random q, k and v in fp64 that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    k_len = length if k_len is None else k_len
    shapes = ((q_heads, length, dim), (k_heads, k_len, dim), (k_heads, k_len, v_dim))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def draw_state(count: int, heads: int, dim: int, v_dim: int, normalize: bool = True) -> State:
    """Sums that features above 0 may leave."""
    generator = torch.Generator().manual_seed(7)
    s = torch.rand(count, heads, dim, v_dim, generator=generator, dtype=torch.float64).requires_grad_()
    z = torch.rand(count, heads, dim, generator=generator, dtype=torch.float64).add(1).detach().requires_grad_()
    return State(s, z if normalize else None)


def gradients(outputs: Any, inputs: Any) -> list[Tensor]:
    """Gradients of a fixed random sum of all outputs."""
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs if o is not None)
    return list(torch.autograd.grad(total, [i for i in inputs if i is not None], retain_graph=True))


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def in_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], state: State | None, **options: Any) -> list[Tensor]:
    """Each row's tokens alone; padding gives 0."""
    rows = []
    for b, n in enumerate(lengths):
        held = None if state is None else (state.s[b], torch.zeros_like(state.s[b, ..., 0]))
        if state is not None and state.z is not None:
            held = (state.s[b], state.z[b])
        out, s, z = token_by_token(q[b, :, :n], k[b, :, :n], v[b, :, :n], state=held, **options)
        rows.append((torch.nn.functional.pad(out, (0, 0, 0, q.shape[2] - n)), s, z))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("feature_map", "normalize"), [("elu", True), ("relu", True), ("identity", False)])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, feature_map: str, normalize: bool) -> None:
    exact = [t.detach().to(dtype).requires_grad_() for t in draw(6, 2, 67, 16, 24)]
    truth_inputs = [t.detach().double().requires_grad_() for t in exact]
    log_decay = torch.tensor([-0.01, -0.3])
    options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "log_decay": log_decay}
    truth = ops.linear_attention(*truth_inputs, **options, backend="reference")
    q, k, v = (t.detach().requires_grad_() for t in exact)
    ages = torch.arange(67)[:, None] - torch.arange(67)
    weights = torch.exp(log_decay[:, None, None] * ages.clamp(min=0)).tril().repeat_interleave(3, 0).to(dtype)
    weights = MAPS[feature_map](q) @ MAPS[feature_map](k).repeat_interleave(3, 1).mT * weights
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights * 16**-0.5
    plain = weights @ v.repeat_interleave(3, 1)
    seen = (truth.detach() != 0).any(-1)[:, :, 20:].all()
    assert seen
    upstream = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).reshape(truth.shape)
    upstream[:, :, :20] = 0  # early sums may be 0 under relu, where plain PyTorch has NaN
    plain = plain[:, :, 20:]
    for form in ("chunked", "recurrent"):
        with torch.set_grad_enabled(form == "chunked"):
            got = ops.linear_attention(*exact, **options, backend=form)
        assert_as_accurate(f"{form} out", got[:, :, 20:], plain, truth[:, :, 20:])
    got = ops.linear_attention(*exact, **options, backend="chunked")
    if feature_map == "relu":
        return
    grads = [
        torch.autograd.grad(o, i, u.to(o.dtype))
        for o, i, u in (
            (got, exact, upstream),
            (plain, [q, k, v], upstream[:, :, 20:]),
            (truth, truth_inputs, upstream),
        )
    ]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one)


def test_values_may_be_narrower_than_features_and_states_stay_wide() -> None:
    q, k, v = (t.detach().float() for t in draw(2, 2, 9, 4, 3))
    out, state = ops.linear_attention(q, k, v.bfloat16(), return_state=True)
    assert out.dtype == torch.bfloat16 and state.s.dtype == state.z.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast, wide = ops.linear_attention(q.bfloat16(), k.bfloat16(), v, return_state=True)
    assert cast.dtype == torch.bfloat16 and wide.s.dtype == torch.float32
    want = ops.linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_state=True)
    assert torch.equal(cast, want[0]) and torch.equal(wide.s, want[1].s)


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_passes(form: str, causal: bool, normalize: bool) -> None:
    q, k, v = draw(2, 1, 10, 2, 2, batch=1)
    state = draw_state(1, 1, 2, 2, normalize)
    options: dict[str, Any] = {"causal": causal, "normalize": normalize, "key_lengths": torch.tensor([9])}
    if causal:
        options["log_decay"] = torch.tensor([-0.3])

    def run(*t: Tensor) -> tuple[Tensor, ...]:
        initial = State(t[3], t[4] if normalize else None)
        out, new = ops.linear_attention(*t[:3], **options, initial_state=initial, return_state=True, backend=form)
        return out, *(part for part in new if part is not None)

    assert torch.autograd.gradcheck(run, (q, k, v, *(part for part in state if part is not None)), fast_mode=True)


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


def largest_and_saved(length: int, run: Any) -> tuple[int, int]:
    """Bytes of the largest tensor made forward or backward, and bytes saved in between."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                sizes.append(t.untyped_storage().nbytes() if isinstance(t, Tensor) else 0)
            return out

    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    inputs = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run(*inputs)
    # The operators are opaque to the mode, so their insides are run without the wrapping.
    with Largest():
        torch.autograd.grad(out.sum(), inputs)
        s = torch.zeros(1, 2, 16, 16)
        q, k, v = (t.detach() for t in inputs)
        rest = (s, s[..., 0].clone(), None, None, None, "elu", True, 1.0, 64)
        made = linear_attention_chunks._init_fn(q, k, v, *rest)
        upstream = torch.ones_like(made[0]), *(torch.zeros_like(t) for t in made[2:])
        chunked.linear_attention_chunks_backward._init_fn(*upstream, *made[:2], q, k, v, *rest)
    return max(sizes), sum(saved.values())


@pytest.mark.parametrize("form", ["linear", "hybrid"])
def test_memory_is_linear_in_length_forward_and_backward(form: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v) if form == "linear" else ops.hybrid_attention(q, k, v, window=32)

    (largest, saved), (largest_4, saved_4) = (largest_and_saved(length, run) for length in (1024, 4096))
    assert largest_4 <= 4.1 * largest and saved_4 <= 4.1 * saved
    token = 2 * 16 * 4 * 4096  # bytes of q
    assert saved_4 <= (5 if form == "linear" else 40) * token


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
