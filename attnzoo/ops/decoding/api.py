"""`decode`: attention of the newest tokens over a cache; validate the call, choose a backend, run it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import Full, Mask
from attnzoo.ops.decoding import attend, reference, triton
from attnzoo.ops.decoding.common import Call, KeyValues, check_last
from attnzoo.ops.decoding.reach import check_reach
from attnzoo.ops.decoding.stored import Stored, stored
from attnzoo.ops.explaining import explanation

_BACKENDS: dict[str, ModuleType] = {"triton": triton, "attention": attend, "reference": reference}  # fastest first
_FULL = Full()


def decode(
    q: Tensor,
    cache: KeyValues,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from the tokens appended last to everything in the cache; their own keys are in it already.

    Row b's query i stands at position `starts[b] + i`. What lies past a row's own length is never read into a result,
    whatever it holds. Memory is linear in the length of the cache. The kernels split long rows over programs and read
    paged, rolling and int8 caches where they stand (flash-decoding; arXiv 2205.14135, 2309.06180).

    Args:
        q: `[B, Hq, Sq, D]`.
        cache: keys `[B, Hk, n, D]` and values `[B, Hk, n, Dv]` with `Hq % Hk == 0`. After a chunk into a rolling cache,
            what its `extend` returned.
        mask: by absolute positions; None: every key of the row is visible, as in `attention`.
        scale: of the scores; None: `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[Hq]`, a logit a head that takes probability and gives no value.
        starts: position of each row's first query, one for all or `[B]` int64: the lengths before the append. None:
            the lengths less Sq. Needed where an append was padded, and then queries past a row's end give 0.
        backend: "auto", "triton" (kernels over every kind of cache; up to 16 queries, no gradients), "attention"
            (`ops.attention` over the cache's view) or "reference".

    Returns:
        `[B, Hq, Sq, Dv]`; a query that sees no key gives 0.

    Raises:
        ValueError: for shapes that do not fit the cache, queries that are not the last tokens of the cache, a mask
            that reaches further back than the cache has kept tokens, or a backend that cannot run the call, with its
            reasons.
    """
    call = _call(q, cache, mask, scale, softcap, sinks, starts)
    return choose(_BACKENDS, call, q.device, backend).run(call)


def explain_decode(
    q: Tensor,
    cache: KeyValues,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: int | Tensor | None = None,
) -> str:
    """Which backend `decode` would run for this call, and why each other one would not; a line each."""
    return explained(_BACKENDS, _call(q, cache, mask, scale, softcap, sinks, starts), q.device)


def explained(backends: dict[str, ModuleType], call: Any, device: torch.device) -> str:
    """A line for each backend: that it runs, or why not."""

    def could(name: str) -> str:
        return "could run, is slower" if device.type == "cuda" or name != "triton" else "interpreted, if asked for"

    chosen = choose(backends, call, device, "auto")
    return explanation(backends, call, chosen, reference="reads lengths back from the device", could=could)


def choose(backends: dict[str, ModuleType], call: Any, device: torch.device, backend: str) -> Any:
    """The backend of that name, or for "auto" the first that can run the call; or a ValueError with all reasons.

    The reference waits for the device and runs only when named, and so do kernels where they are interpreted.
    """
    if backend != "auto" and backend not in backends:
        raise ValueError(f"backend must be 'auto' or one of {list(backends)}, got {backend!r}")
    refusals = []
    for name, module in backends.items():
        if backend == "auto":
            if name == "reference" or (name == "triton" and device.type != "cuda"):
                continue
        elif name != backend:
            continue
        why = module.reasons(call)
        if not why:
            return module
        refusals.append(f"{name}: {'; '.join(why)}")
    raise ValueError("no backend can run this call\n" + "\n".join(refusals))


def _call(
    q: Tensor,
    cache: KeyValues,
    mask: Mask | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    starts: int | Tensor | None,
) -> Call:
    """The call, validated and with its defaults filled in."""
    held = stored(cache)
    mask = _FULL if mask is None else mask
    _check(q, held, starts)
    q_len = q.shape[2]
    check_reach(mask, q_len, cache)
    if starts is None:
        starts = cache.length - q_len if cache.uniform else cache.lengths - q_len
    if isinstance(starts, int):
        check_last(starts, q_len, cache.length)
    return Call(q, cache, held, mask, scale, softcap, sinks, starts, cache.first)


def _check(q: Tensor, held: Stored, starts: int | Tensor | None) -> None:
    shape, batch = q.shape, held.batch
    _, heads, _, dim = held.k[0].shape
    if len(shape) != 4 or shape[0] != batch or shape[1] % heads or shape[3] != dim:
        raise ValueError(
            f"q has shape {list(shape)}; this cache takes [{batch}, a multiple of {heads}, queries, {dim}]"
        )
    if isinstance(starts, Tensor) and starts.shape != (batch,):
        raise ValueError(f"starts has shape {list(starts.shape)}; it must be [{batch}]")
