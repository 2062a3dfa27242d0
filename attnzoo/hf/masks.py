"""The mask function of `attn_implementation="attnzoo"`: no S x S tensor where the pattern alone says everything.

What a model's attention layers get in place of a mask is one of

- None: the pattern alone, aligned bottom right: causal, a sliding window (which the layer names itself), or everything
  for layers that are not causal;
- int32 `[B, 1, 1, n]`: the same inside documents; the number of the document that each of the first n keys belongs to.
  Packed batches, and the prefill of a static cache, whose keys past n do not exist yet;
- bool `[B, 1, S_q, S_k]`, True where the query sees the key: whatever else, padding above all.

transformers describes a pattern by a function of positions, made of closures. Those that it makes itself are recognised
here; a function that is not recognised costs a mask tensor, never a wrong one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

# Models that mask with a window but do not tell their attention function about it.
_SILENT_ABOUT_WINDOW = frozenset({"blt", "doge", "phimoe", "qwen2_moe"})
# Models that read the mask themselves, so that it has to be there.
_READS_MASK = frozenset({"doge", "diffusion_gemma", "dots3_note", "falcon", "mistral_large4"})


@dataclass(frozen=True)
class Pattern:
    """What a transformers mask function was recognised to say."""

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None  # [B, S]: number of the document of each token


def read_pattern(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern of one of transformers' own mask functions, or None for a function that is not one of them."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling():  # cannot look into closures
        return None
    code = getattr(mask_function, "__code__", None)
    closure = getattr(mask_function, "__closure__", None)
    if code is None or not closure:
        return None
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}
    maker = mask_function.__qualname__.partition(".<locals>.")[0]
    if maker == "sliding_window_overlay" and isinstance(held.get("sliding_window"), int):
        return Pattern(window=held["sliding_window"])
    if maker == "packed_sequence_mask_function" and isinstance(held.get("packed_sequence_mask"), Tensor):
        return Pattern(documents=held["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence" and callable(held.get("mask_function")):
        # Positions restart with each document, and causality and windows only look at differences inside one.
        return read_pattern(held["mask_function"])
    if maker == "and_masks" and isinstance(held.get("mask_functions"), tuple):
        merged: Pattern | None = Pattern()
        for part in held["mask_functions"]:
            merged = _both(merged, read_pattern(part))
        return merged
    return None


def _both(first: Pattern | None, second: Pattern | None) -> Pattern | None:
    if first is None or second is None:
        return None
    if first.documents is not None and second.documents is not None:
        return None
    windows = [w for w in (first.window, second.window) if w is not None]
    documents = second.documents if first.documents is None else first.documents
    merged = replace(first, causal=first.causal or second.causal, documents=documents)
    return replace(merged, window=min(windows, default=None))


def attnzoo_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the layers get as mask, for transformers' `AttentionMaskInterface`; the arguments are `sdpa_mask`'s.

    Args:
        batch_size, q_length, kv_length: B, S_q and S_k.
        q_offset, kv_offset: absolute positions of the first query and the first key.
        mask_function: the pattern, as a function of (batch, head, query, key) indices.
        attention_mask: bool `[B, seen]`, False at padding, or None.
        local_size: window or chunk, in tokens; the pattern holds it too.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the model accepts None for these patterns.
        config: the model's configuration.

    Returns:
        None, int32 `[B, 1, 1, n]` or bool `[B, 1, S_q, S_k]`: see the module.

    Raises:
        ValueError: for a model whose layers do not call the attention function that transformers' config names.
    """
    if config is not None and not _uses_the_interface(type(config)):
        raise ValueError(
            f'attn_implementation="attnzoo" does not reach the attention layers of {config.model_type}, which compute '
            'attention by themselves in this version of transformers; use attn_implementation="eager"'
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    pattern = read_pattern(mask_function)
    model_type = getattr(config, "model_type", None)
    if pattern is not None and model_type not in _READS_MASK:
        if pattern.causal:
            spoken = pattern.window is None or model_type not in _SILENT_ABOUT_WINDOW
            if pattern.documents is not None and padding is None and spoken:
                return pattern.documents.to(torch.int32).expand(batch_size, -1)[:, None, None, :]
            seen = _keys_so_far(q_length, kv_length, q_offset, kv_offset)
            if allow_is_causal_skip and spoken and seen is not None and _all_real(padding, kv_offset, seen):
                if seen == kv_length:
                    return None
                return torch.zeros((batch_size, 1, 1, seen), dtype=torch.int32, device=device)
        elif pattern.window is None and pattern.documents is None:
            if allow_is_bidirectional_skip and _all_real(padding, kv_offset, kv_length):
                return None
            if padding is not None:  # a view: the padding is the same for every query
                real = padding[:, None, None, kv_offset : kv_offset + kv_length]
                return real.to(torch.bool).expand(batch_size, 1, q_length, kv_length)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        # With a window, transformers itself knows when all keys lie inside.
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )


@torch.compiler.assume_constant_result
def _uses_the_interface(config: type) -> bool:
    """Whether a config's model computes attention through transformers' interface.

    transformers lets any model be made with any registered attn_implementation, asks its mask function for masks, and
    lets the layers that know no interface (Bloom's, CodeGen's) take None for "everything is visible".
    """
    modeling = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    if modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return True
    own = (
        value for value in vars(modeling).values() if isinstance(value, type) and value.__module__ == modeling.__name__
    )
    return not any("Attention" in cls.__name__ and issubclass(cls, nn.Module) for cls in own)


def _keys_so_far(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> int | None:
    """How many keys there are when the queries are the last of them; None if that cannot be told."""
    if isinstance(q_offset, Tensor):
        # A static cache counts on the device. Decoding never comes here, so this waits for the device once a prefill.
        if is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    seen = q_offset + q_length - kv_offset
    return seen if seen <= kv_length else None


def _all_real(padding: Tensor | None, kv_offset: int, keys: int) -> bool:
    """Whether none of the first `keys` keys is padding. Under tracing a mask's values cannot be read: False."""
    if padding is None:
        return True
    return not is_tracing(padding) and bool(padding[:, kv_offset : kv_offset + keys].all())
