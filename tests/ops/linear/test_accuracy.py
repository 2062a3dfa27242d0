"""Linear attention's errors and dtypes, its gradients, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.ops.linear import State, chunked
from attnzoo.ops.linear.chunked import linear_attention_chunks
from tests.ops.linear.inputs import draw, draw_state
from tests.ops.naive_linear import MAPS
from tests.support.compare import assert_as_accurate

pytestmark = pytest.mark.usefixtures("small_chunks")


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
