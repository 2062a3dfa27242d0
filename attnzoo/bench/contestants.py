"""How each contestant is called, on the same tensors: `[B, S, H, D]` in memory, as projections leave them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo import ops
from attnzoo.bench.cases import Case, flex_mask
from attnzoo.masks import Causal, Full, SlidingWindow


class Unavailable(Exception):
    """The contestant is not installed, or has no such case."""


class Data(NamedTuple):
    """A case's tensors, `[B, S, H, D]`; the leaves whose gradients are asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    sinks: Tensor | None
    slopes: Tensor | None
    boundaries: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return (self.q, self.k, self.v) if self.sinks is None else (self.q, self.k, self.v, self.sinks)


def draw(case: Case, device: str = "cuda") -> Data:
    """Fresh random tensors for a case."""

    def normal(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_(leaf)

    b, s, d = case.batch, case.length, case.dim
    q, k, v = normal(b, s, case.q_heads, d), normal(b, s, case.k_heads, d), normal(b, s, case.k_heads, d)
    sinks = normal(case.q_heads) if case.sinks else None
    slopes = 2.0 ** -torch.linspace(0.25, 8, case.q_heads, device=device) if case.alibi else None
    boundaries = torch.tensor(case.boundaries, dtype=torch.int32, device=device) if case.documents else None
    return Data(q, k, v, normal(b, s, case.q_heads, d, leaf=False), sinks, slopes, boundaries)


def prepare(name: str, case: Case, data: Data) -> Callable[[], Tensor]:
    """A function without arguments that runs the forward and gives `[B, S, H, D]`.

    Raises:
        Unavailable: with the reason.
    """
    kind, _, which = name.partition(":")
    if kind == "via":
        return _attention(which, case, data)
    makers: dict[str, Callable[[Case, Data], Callable[[], Tensor]]] = {"flex": _flex, "fa3": _fa3, "fa4": _fa4}
    return makers[which](case, data) if which in makers else _sdpa(which, case, data)


def _attention(backend: str, case: Case, data: Data) -> Callable[[], Tensor]:
    q, k, v = (t.transpose(1, 2) for t in data[:3])
    options: dict[str, Any] = {
        "mask": case.mask,
        "softcap": case.softcap,
        "sinks": data.sinks,
        "alibi_slopes": data.slopes,
        "cu_seqlens_q": data.boundaries,
        "dropout_p": case.dropout_p,
        "deterministic": case.deterministic,
        "backend": backend,
    }
    return lambda: _attend(q, k, v, options)


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    try:
        return ops.attention(q, k, v, **options).transpose(1, 2)
    except ValueError as refusal:
        raise Unavailable(str(refusal).splitlines()[-1]) from refusal


def _sdpa(which: str, case: Case, data: Data) -> Callable[[], Tensor]:
    q, k, v = (t.transpose(1, 2) for t in data[:3])
    options: dict[str, Any] = {"is_causal": isinstance(case.mask, Causal), "enable_gqa": case.q_heads != case.k_heads}
    kernels = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}

    def run() -> Tensor:
        if which == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(kernels[which]):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return run


def _flex(case: Case, data: Data) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # a backward is timed over and over on one graph
    torch._dynamo.reset()  # at its recompile limit it would fall back to a dense kernel without a word
    q, k, v = (t.transpose(1, 2) for t in data[:3])
    make = create_block_mask if case.length <= 16384 else torch.compile(create_block_mask)  # written out, or not
    blocks = make(flex_mask(case), None, None, case.length, case.length, device="cuda")
    flex = torch.compile(flex_attention, dynamic=False)
    grouped = case.q_heads != case.k_heads
    return lambda: flex(q, k, v, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)  # type: ignore[union-attr]


def _fa3(case: Case, data: Data) -> Callable[[], Tensor]:
    library = _import("fa3_fwd_interface")
    if not isinstance(case.mask, Causal | Full) or case.sinks:
        raise Unavailable("has no such case")
    q, k, v = (t.detach() for t in data[:3])
    options: dict[str, Any] = {"causal": isinstance(case.mask, Causal), "softcap": case.softcap or 0.0}
    if data.boundaries is None:
        return lambda: _first(library.flash_attn_func(q, k, v, **options))
    longest = case.length // case.documents
    ends = (data.boundaries, data.boundaries, longest, longest)
    return lambda: _first(library.flash_attn_varlen_func(q[0], k[0], v[0], *ends, **options))[None]


def _fa4(case: Case, data: Data) -> Callable[[], Tensor]:
    library = _import("flash_attn.cute")
    options: dict[str, Any] = {"causal": isinstance(case.mask, Causal), "softcap": case.softcap or 0.0}
    if isinstance(case.mask, SlidingWindow):
        options["window_size"] = (case.mask.window - 1, case.mask.ahead)
    if data.sinks is not None:
        options["learnable_sink"] = data.sinks
    if data.boundaries is None:
        return lambda: _first(library.flash_attn_func(*data[:3], **options))
    ends = {"cu_seqlens_q": data.boundaries, "cu_seqlens_k": data.boundaries}
    longest = case.length // case.documents
    options |= ends | {"max_seqlen_q": longest, "max_seqlen_k": longest}
    q, k, v = (t[0] for t in data[:3])
    return lambda: _first(library.flash_attn_varlen_func(q, k, v, **options))[None]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name} does not import: {type(error).__name__}: {error}".splitlines()[0]) from error
