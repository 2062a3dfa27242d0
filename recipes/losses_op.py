"""The operator behind `recipes.losses`: opaque to torch.compile, differentiable, walks over chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted, triton_reasons
from recipes.losses_rows import Rule, losses_of_rows

BACKENDS = ("auto", "triton", "torch")
LOGITS_AT_ONCE = {"cuda": 1 << 29, "cpu": 1 << 24}  # elements of a chunk at most, where the caller leaves it open


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    teacher: Any,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight * cross-entropy + kl_weight * divergence, and the two; gradients flow through the first alone.

    See `recipes.losses` for the arguments; `targets` and `teacher` may be None, and then that part is 0.
    """
    top = teacher is not None and hasattr(teacher, "ids")
    full = teacher is not None and not top
    _check(hidden, weight, bias, targets, teacher if full else None, teacher if top else None, rows)
    _check_numbers(softcap, temperature, chunk_tokens, backend)
    tracked = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    total, cross_entropy, kl, *_ = _op(
        *(hidden, weight, bias, targets, rows),
        *((teacher.hidden, teacher.weight, teacher.bias) if full else (None, None, None)),
        *((teacher.ids, teacher.logprobs) if top else (None, None)),
        *(softcap or 0.0, logit_scale),
        *((teacher.softcap or 0.0, teacher.logit_scale) if full else (0.0, 1.0)),
        *(temperature, ce_weight, kl_weight),
        chunk_tokens or 0,
        _matmul_dtype(hidden, weight),
        _matmul_dtype(teacher.hidden, teacher.weight) if full else torch.float32,
        tracked,
        backend,
    )
    return total, cross_entropy, kl


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    rows: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    softcap: float,
    scale: float,
    teacher_softcap: float,
    teacher_scale: float,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    chunk_tokens: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    tracked: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums, and the gradients of hidden, weight and bias, each empty where it is not `tracked`."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    sums = _sums_dtype(hidden)
    rule = Rule(
        *(softcap, scale, teacher_softcap, teacher_scale, temperature, ce_weight, kl_weight), gradient=any(tracked)
    )
    each = _rows_function(hidden.device, backend, dtype)
    cross_entropy, kl = (torch.zeros(tokens, dtype=sums, device=hidden.device) for _ in range(2))
    d_hidden, d_weight, d_bias = _empty_gradients(hidden, weight, bias, tracked)
    chunk = chunk_tokens or _chunk(hidden.device, vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are chosen here
        head = weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        for start in range(0, tokens, chunk):
            piece = slice(start, start + chunk)
            inputs = hidden[piece].to(dtype)
            logits = _logits(inputs, head, shift)  # [n, V]; each() leaves its gradient there
            teacher = None
            if teacher_hidden is not None:
                tensors = (teacher_hidden[piece], teacher_weight, teacher_bias)
                teacher = _logits(*(None if t is None else t.to(teacher_dtype) for t in tensors))
            per_row = (None if t is None else t[piece] for t in (targets, rows, ids, logprobs))
            each(logits, teacher, *per_row, cross_entropy[piece], kl[piece], rule)
            if tracked[0]:
                d_hidden[piece] = logits @ head
            if tracked[1]:
                _add_product(d_weight, logits, inputs)
            if tracked[2]:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
            del logits, teacher  # or the next chunk's would be made beside them
    cross_entropy, kl = cross_entropy.sum(), kl.sum()
    total = ce_weight * cross_entropy + kl_weight * kl
    return total, cross_entropy, kl, d_hidden, d_weight, d_bias


def _fake(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    sums = [hidden.new_empty((), dtype=_sums_dtype(hidden)) for _ in range(3)]
    return *sums, *_empty_gradients(hidden, weight, bias, rest[-2])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_total, *_):  # type: ignore[no-untyped-def]
    none = [None] * ctx.arguments
    if d_total is None:
        return tuple(none)
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    gradients = [(gradient * d_total).to(dtype) if wanted else None for gradient, dtype, wanted in made]
    return *gradients, *none[3:]


_op = torch.library.custom_op("recipes::linear_loss", _forward, mutates_args=())
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_save)


def _chunk(device: torch.device, vocabulary: int) -> int:
    """A power of two: matmuls of other sizes were up to a fifth slower."""
    most = LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cpu"]) // vocabulary
    return max(256, 1 << max(most, 1).bit_length() - 1)


def _logits(inputs: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    return inputs @ head.t() if bias is None else torch.addmm(bias, inputs, head.t())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, without rounding the product to the factors' dtype where the device can."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    elif left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, tracked: list[bool]) -> list[Tensor]:
    """Of hidden in its dtype, and sums of zero for weight and bias."""
    sums = _sums_dtype(hidden)
    nothing = hidden.new_empty(0)
    return [
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if tracked[0] else nothing,
        torch.zeros(weight.shape, dtype=sums, device=weight.device) if tracked[1] else nothing.clone(),
        torch.zeros(bias.shape, dtype=sums, device=bias.device) if tracked[2] and bias is not None else nothing.clone(),
    ]


def _sums_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast would multiply in; without it what the tensors are."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _rows_function(device: torch.device, backend: str, dtype: torch.dtype) -> Any:
    reasons = triton_reasons(device)
    if dtype == torch.float64:
        reasons = [*reasons, "computes in fp32"]
    if backend == "torch" or (backend == "auto" and (reasons or interpreted())):
        return losses_of_rows
    if reasons:
        raise ValueError(f"backend='triton' cannot run: it {'; it '.join(reasons)}")
    from recipes.losses_triton import losses_of_rows as kernels

    return kernels


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    full: Any,
    top: Any,
    rows: Tensor | None,
) -> None:
    def require(name: str, t: Tensor | None, shape: tuple[int | str, ...], kinds: str) -> None:
        if t is None:
            return
        is_right = {
            "floating point": t.is_floating_point(),
            "integers": not t.is_floating_point() and t.dtype != torch.bool,
            "bool": t.dtype == torch.bool,
        }[kinds]
        sizes = len(t.shape) == len(shape) and all(
            isinstance(b, str) or a == b for a, b in zip(t.shape, shape, strict=True)
        )
        if not (is_right and sizes):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be {kinds} [{wanted}], got {t.dtype} {list(t.shape)}")

    require("hidden", hidden, ("T", "D"), "floating point")
    tokens, dim = hidden.shape
    require("weight", weight, ("V", dim), "floating point")
    vocabulary = weight.shape[0]
    require("bias", bias, (vocabulary,), "floating point")
    require("targets", targets, (tokens,), "integers")
    require("rows", rows, (tokens,), "bool")
    if full is not None:
        require("teacher_hidden", full.hidden, (tokens, "D"), "floating point")
        require("teacher_weight", full.weight, (vocabulary, full.hidden.shape[1]), "floating point")
        require("teacher_bias", full.bias, (vocabulary,), "floating point")
    if top is not None:
        require("ids", top.ids, (tokens, "k"), "integers")
        require("logprobs", top.logprobs, (tokens, top.ids.shape[1]), "floating point")
        if not 1 <= top.ids.shape[1] <= vocabulary:
            raise ValueError(f"ids must hold 1 to {vocabulary} tokens a row, got {top.ids.shape[1]}")


def _check_numbers(softcap: float | None, temperature: float, chunk_tokens: int | None, backend: str) -> None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1 or None, got {chunk_tokens}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
