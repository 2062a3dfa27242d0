"""`attn_implementation="attnzoo"`: transformers models on `attnzoo.ops.attention`.

Keys are never repeated for grouped queries, and no S x S mask is made where `attnzoo.hf.masks` can do without.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from attnzoo import ops
from attnzoo.masks import Causal, Full, Mask, SlidingWindow

if TYPE_CHECKING:
    from attnzoo.hf.generation.layer import HeldLayer

logger = logging.get_logger(__name__)

# Made once, not in each layer of each step, which torch.compile would have to trace.
_FULL, _CAUSAL = Full(), Causal()
_cached_window = lru_cache(SlidingWindow)

# Arguments of other attention functions that would change the result, with what to say of each.
_REFUSED = {
    "position_bias": "a bias added to the scores (T5 and its kin)",
    "attention_bias": "a bias added to the scores",
    "alibi": "a bias added to the scores",
    "head_mask": "a mask over heads",
    "block_indices": "keys chosen by the model",
    "cache": "a paged cache of continuous batching",
}


def attnzoo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' `AttentionInterface`.

    Args:
        module: the attention layer; `is_causal` (True if absent) and `training` are read from it.
        query, key, value: `[B, Hq, S_q, D]`, `[B, Hk, S_k, D]`, `[B, Hk, S_k, Dv]`.
        attention_mask: what `attnzoo_mask` made; or a 4-D mask of the caller's, bool (True: visible) or floating point
            with 0 where visible and the dtype's minimum or -inf where not.
        dropout: probability; counts in training mode only.
        scaling: multiplies the scores; D ** -0.5 if None.
        sliding_window: keys that a query of a causal layer sees, itself included; used where `attention_mask` leaves
            the pattern to the layer.
        softcap: scores become softcap * tanh(scores / softcap).
        is_causal: overrides the module's.
        s_aux: attention sinks, one logit a query head, `[Hq]`.
        cu_seq_lens_q, cu_seq_lens_k: int32 `[N + 1]`, the boundaries of packed documents in the flattened batch.

    Returns:
        (`[B, S_q, Hq, Dv]`, None): the weights are never formed.

    Raises:
        ValueError: for a mask of another form, for boundaries together with a mask, and for arguments that would
            change the result and are not supported.
    """
    refuse_unsupported(module, kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if query.shape[0] == 1 != key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    out = masked_attention(
        query,
        key,
        value,
        attention_mask,
        pattern=_pattern(is_causal, sliding_window, attention_mask, key.shape[2]),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_k,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an argument that would change what `module` computes and cannot be honoured."""
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f'attn_implementation="attnzoo" does not support {name}, {meaning}, which '
                f'{type(module).__name__} passes; use attn_implementation="eager" or "sdpa" for this model'
            )
    if kwargs.get("output_attentions"):
        logger.warning_once('attn_implementation="attnzoo" returns no attention weights; use "eager" to see them')


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pattern: Mask,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`ops.attention` under a mask in any of the forms that `attnzoo_mask` makes.

    Args:
        query, key, value: `[B, Hq, S_q, D]`, `[B, Hk, S_k, D]`, `[B, Hk, S_k, Dv]`.
        attention_mask: None, int32 `[B, 1, 1, n]`, or a 4-D bool or additive mask; the last two say everything.
        pattern: who sees whom where `attention_mask` leaves it open.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, boundaries of packed documents in the flattened batch.
        options: passed on to `ops.attention`.

    Returns:
        `[B, Hq, S_q, Dv]`.
    """
    held = layer_of(key)
    if held is not None:
        if cu_seqlens_q is not None or options.get("dropout_p"):
            raise ValueError("a cache of attnzoo.hf.cache_for takes neither cu_seq_lens_q nor dropout in training")
        options.pop("dropout_p", None)
        return held.attend(query, key, value, attention_mask, pattern, **options)
    numbered = attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    )
    if cu_seqlens_q is not None:
        # The compiler cannot tell padding from a pattern, and drops a mask that nobody reads.
        if attention_mask is not None and not numbered and not is_tracing(attention_mask):
            raise ValueError("cu_seq_lens_q came with an attention_mask: give packed documents without a mask")
        return _packed(query, key, value, cu_seqlens_q, cu_seqlens_k, mask=pattern, **options)
    if attention_mask is None:
        return ops.attention(query, key, value, mask=pattern, **options)
    if not numbered:
        mask = visible_of(attention_mask)[..., : key.shape[2]]
        return ops.attention(query, key, value, mask=mask, **options)

    documents = document_numbers(attention_mask, query.shape[2])
    keys = documents.shape[1]
    key, value = key[:, :, :keys], value[:, :, :keys]
    if is_tracing(documents):
        # The number of documents would be a shape that depends on data.
        mask = (documents[:, None, :, None] == documents[:, None, None, :])[:, :, -query.shape[2] :]
        return ops.attention(
            query, key, value, mask=mask & pattern.dense(query.shape[2], keys, device=key.device), **options
        )
    if not bool(documents.any()):
        return ops.attention(query, key, value, mask=pattern, **options)
    return _packed(query, key, value, boundaries(documents), None, mask=pattern, **options)


def layer_of(key: Tensor) -> HeldLayer | None:
    """The layer of an `attnzoo.hf.cache_for` cache that these keys have yet to be stored in, if there is one."""
    return None if torch.compiler.is_compiling() else getattr(key, "attnzoo_layer", None)


def _pattern(is_causal: bool, window: int | None, attention_mask: Tensor | None, keys: int) -> Mask:
    if not is_causal:
        if window is not None and attention_mask is None and keys >= window:
            raise ValueError(
                f"sliding_window={window} on a layer that is not causal needs a mask when there are {keys} keys; "
                "attention_mask is None"
            )
        return _FULL
    return _CAUSAL if window is None else _window(window)


@torch.compiler.assume_constant_result
def _window(window: int) -> Mask:
    return _cached_window(window)


def visible_of(mask: Tensor) -> Tensor:
    """A caller's 4-D mask as bool."""
    if mask.ndim != 4:
        raise ValueError(f"attention_mask must be 4-D, [B, 1 or Hq, S_q, S_k], got shape {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if is_tracing(mask):
        raise ValueError("attention_mask must be bool under torch.compile, got an additive mask")
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise ValueError(
            'attn_implementation="attnzoo" takes masks, not biases: a floating point attention_mask may hold '
            f"0 (visible) and {torch.finfo(mask.dtype).min} or -inf (hidden), got other values"
        )
    return visible


def document_numbers(mask: Tensor, q_length: int) -> Tensor:
    """The `[B, n]` numbers of the documents out of an int32 mask `[B, 1, 1, n]`."""
    if mask.dtype != torch.int32 or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] < q_length:
        raise ValueError(
            "attention_mask must be a bool tensor [B, 1, S_q, S_k] or an additive floating point one, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask[:, 0, 0, :]


def boundaries(documents: Tensor) -> Tensor:
    """Document numbers `[B, S]` of the rows as cu_seqlens, int32 `[N + 1]`, of the flattened batch."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([documents.numel()]))).to(torch.int32)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor | None, *, mask: Mask, **options: Any
) -> Tensor:
    """Attention inside documents; rows of a batch are laid end to end first, as transformers' boundaries count."""
    batch, _, length, _ = query.shape
    if batch > 1:
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
    out = ops.attention(query, key, value, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    if batch > 1:
        out = out[0].unflatten(1, (batch, length)).transpose(0, 1)
    return out
