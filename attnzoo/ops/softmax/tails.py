"""Rows past the last of packed documents: whatever they hold, nobody sees it, and results are zero there.

Where the last document ends is known on the device only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import is_plain, triton_reasons


def cleared(t: Tensor, boundaries: Tensor) -> Tensor:
    """A copy of `t`, `[1, H, S, D]`, with zeros past the last boundary."""
    return clear(t.clone(), boundaries)


def clear(t: Tensor, boundaries: Tensor, value: float = 0.0) -> Tensor:
    """`t`, `[1, H, S, D]` or `[1, H, S]`, with `value` written into it past the last boundary."""
    if not is_plain(t) or (t.dim() == 4 and t.stride(3) != 1) or triton_reasons(t.device):
        dead = torch.arange(t.shape[2], device=t.device) >= boundaries[-1]
        return t.masked_fill_(dead[:, None] if t.dim() == 4 else dead, value)
    from attnzoo.ops.softmax.triton.launch import clear_tail

    clear_tail(t, boundaries, value)
    return t
