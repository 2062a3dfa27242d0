"""Longformer's pattern (arXiv 2004.05150): a window, and a few tokens that see and are seen by all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnzoo.masks.base import Mask, check_integer
from attnzoo.masks.causal import Causal
from attnzoo.masks.dilated import Dilated
from attnzoo.masks.global_tokens import GlobalTokens
from attnzoo.masks.sliding_window import SlidingWindow


def longformer(window: int, tokens: int | Sequence[int] | Tensor, *, dilation: int = 1, causal: bool = False) -> Mask:
    """`SlidingWindow | GlobalTokens`, with Longformer's way to count the window.

    Args:
        window: as `attention_window` in Longformer's config: half of it to each side of the query's own key; even.
            Causal: the keys up to the query's own, itself included, of any number.
        tokens: the global tokens, as of `GlobalTokens`.
        dilation: distance between neighbours in the window, as of `Dilated`.
        causal: for a decoder; nobody sees later keys, not even global tokens do.

    Raises:
        ValueError: for a window that is odd or less than 2 (less than 1 if causal), and as the masks do.
    """
    check_integer("window", window, 1 if causal else 2)
    if causal:
        return (_local(window, 0, dilation) | GlobalTokens(tokens)) & Causal()
    if window % 2:
        raise ValueError(f"window must be even, half of it to each side, got {window}")
    return _local(window // 2 + 1, window // 2, dilation) | GlobalTokens(tokens)


def _local(window: int, ahead: int, dilation: int) -> Mask:
    return SlidingWindow(window, ahead) if dilation == 1 else Dilated(window, dilation, ahead)


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(longformer(12, (0, 1, 40)), name="longformer")
