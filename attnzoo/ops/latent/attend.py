"""Latent decoding as attention with one wide key head, through `decode`; any mask, any device, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.decoding import decode
from attnzoo.ops.latent.common import Call, Held


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: it always can."""
    return []


def run(call: Call) -> Tensor:
    """The result, `[B, H, Sq, R]`."""
    cache, rank = call.cache, call.q_latent.shape[-1]
    keys = cache.joint() if hasattr(cache, "joint") else torch.cat(cache.view(), dim=-1)
    # The values stay as wide as the keys, without a copy: PyTorch's fused kernels take no others.
    held, q = Held(cache, keys, keys), torch.cat([call.q_latent, call.q_rope], dim=-1)
    return decode(q, held, mask=call.mask, scale=call.scale, starts=call.starts, backend="attention")[..., :rank]
