"""`cache_for`: the cache that a model's layers need, of one kind, with room for everything from the start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.caches import ContiguousCache, Int8Cache, LatentCache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.caches.token_cache import TokenCache, check_least
from attnzoo.hf.generation.cache import HeldCache
from attnzoo.hf.generation.layer import HeldLayer
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.layers import SwappedAttention
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.masks import _SILENT_ABOUT_WINDOW
from attnzoo.hf.recurrent_cache import RecurrentLayer
from attnzoo.ops.decoding.reach import first_tokens, reach

Kind = Literal["contiguous", "paged", "int8", "paged_int8", "rolling"]
_PAGE = 64


def cache_for(model: PreTrainedModel, batch_size: int, max_length: int, kind: Kind = "contiguous") -> HeldCache:
    """A cache for `model.generate(..., past_key_values=cache)`, read in place by `attnzoo.ops.decode`.

    It takes greedy search, sampling, beams (whose number counts in `batch_size`, as that of sequences a prompt does),
    and padding on either side. Memory is taken at the first forward pass, when the layers' shapes and dtype are known.
    Latent attention of `attnzoo.swap` gets latents of that kind, linear attention its state.

    Args:
        model: a decoder with attn_implementation="attnzoo", stock or swapped.
        batch_size: rows of the batch.
        max_length: tokens that a row may come to have, padding of the prompt and new tokens included.
        kind: "contiguous"; "paged", pages of 64 tokens; "int8" and "paged_int8", half the bytes, the newest 64 tokens
            as they came; "rolling", the last `window` tokens of layers with a sliding window, with the first
            tokens where the layer sees them too, and everything of others.

    Raises:
        ValueError: for another implementation or kind of model, or sizes below 1.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(map(repr, get_args(Kind)))}")
    check_least("batch_size", batch_size, 1)
    check_least("max_length", max_length, 1)
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "attnzoo":
        raise ValueError(
            f'model has attn_implementation {config._attn_implementation!r}; this cache needs "attnzoo" '
            '(attnzoo.swap sets it, and model.set_attn_implementation("attnzoo"))'
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {type(model).__name__}, an encoder and a decoder; this cache is for decoders")
    number = config.num_hidden_layers
    ours = {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(module, SwappedAttention | SwappedLatentAttention | SwappedLinearAttention)
    }
    windows = _windows(config, number)
    layers: list[HeldLayer | RecurrentLayer] = []
    for index in range(number):
        module = ours.get(index)
        if isinstance(module, SwappedLinearAttention):
            layers.append(RecurrentLayer())
            continue
        if isinstance(module, SwappedLatentAttention) and module.softcap is not None:
            raise ValueError("model has latent attention with a softcap, which no kernel over a cache computes")
        prefix = first_tokens(module.mask) if isinstance(module, SwappedAttention) else 0
        window = windows[index] if module is None else reach(module.mask, prefix)
        latent = isinstance(module, SwappedLatentAttention)
        make = _maker(kind, batch_size, max_length, window, prefix, latent=latent)
        layers.append(HeldLayer(make, max_length))
    return HeldCache(layers, batch_size, max_length)


def _windows(config: Any, number: int) -> list[int | None]:
    """The window of each layer of a stock model, as its config says it."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"model has layers of the kinds {sorted(set(kinds))}; this cache knows full and sliding ones")
    if window is not None and not getattr(config, "use_sliding_window", True):
        window = None
    found = [window if kinds is None or kinds[index] == "sliding_attention" else None for index in range(number)]
    if any(found) and config.model_type in _SILENT_ABOUT_WINDOW:
        raise ValueError(f"the layers of {config.model_type} do not tell their attention function about their window")
    return found


def _maker(
    kind: str, batch_size: int, max_length: int, window: int | None, prefix: int, *, latent: bool
) -> Callable[[Tensor, Tensor], TokenCache]:
    pages = batch_size * -(-max_length // _PAGE)

    def make(k: Tensor, v: Tensor) -> TokenCache:
        if k.shape[0] != batch_size:
            raise ValueError(f"the cache is made for batch_size {batch_size}; a batch of {k.shape[0]} came")
        build: Any = partial(_BUILD[kind], batch_size, k.shape[1])
        sizes = k.shape[3], v.shape[3]
        form: dict[str, Any] = {"dtype": k.dtype, "device": k.device}
        if kind == "rolling" and window is not None and window + prefix < max_length:
            return build(window, *sizes, prefix=prefix, **form)  # type: ignore[no-any-return]
        if kind in ("paged", "paged_int8"):
            return build(pages, *sizes, page_size=_PAGE, max_length=max_length, **form)  # type: ignore[no-any-return]
        if kind == "int8":
            return build(max_length, *sizes, **form)  # type: ignore[no-any-return]
        if latent:
            return LatentCache(batch_size, max_length, *sizes, **form)
        return ContiguousCache(batch_size, k.shape[1], max_length, *sizes, **form)

    return make


_BUILD: dict[str, type[TokenCache]] = {
    "contiguous": ContiguousCache,
    "rolling": RollingCache,
    "paged": PagedCache,
    "int8": Int8Cache,
    "paged_int8": PagedInt8Cache,
}
