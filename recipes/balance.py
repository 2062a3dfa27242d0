"""Latent attention's factors, rescaled against one another so that an optimizer moves both alike."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.hf.latent import SwappedLatentAttention


@torch.no_grad()
def balance(model: PreTrainedModel) -> None:
    """Gives the two factors of each latent and of each rope plane the same root mean square, in place.

    A conversion leaves latents of a size near 1 in front of up-projections fifty times smaller. AdamW steps by one
    size in all weights, so the small factor would be overturned before the large one has moved. What is scaled up on
    one side is scaled down on the other, so the function stays the same up to rounding.
    """
    for layer in model.modules():
        if isinstance(layer, SwappedLatentAttention):
            _balance_latents(layer)
            _balance_rope(layer)


def _balance_latents(layer: SwappedLatentAttention) -> None:
    down, up, rank = layer.kv_a_proj_with_mqa, layer.kv_b_proj, layer.kv_lora_rank
    factor = _factor(_rms(down.weight[:rank], 1), _rms(up.weight, 0))  # [rank]
    up.weight.div_(factor)
    for tensor in (down.weight, down.bias):
        if tensor is not None:
            tensor[:rank].mul_(factor.view(-1, *[1] * (tensor.ndim - 1)))


def _balance_rope(layer: SwappedLatentAttention) -> None:
    """The two rows that turn together get one factor: a scalar commutes with their rotation."""
    down, half, nope = layer.kv_a_proj_with_mqa, layer.qk_rope_head_dim // 2, layer.qk_nope_head_dim
    queries = layer.q_proj if layer.q_lora_rank is None else layer.q_b_proj
    keys = down.weight[layer.kv_lora_rank :].unflatten(0, (2, half))  # [2, half, dim]
    asked = queries.weight.unflatten(0, (layer.num_heads, -1))[:, nope:].unflatten(1, (2, half))  # [H, 2, half, in]
    factor = _factor(_rms(keys, 0, 2), _rms(asked, 0, 1, 3))  # [half]
    for tensor in (down.weight, down.bias):
        if tensor is not None:
            rows = tensor[layer.kv_lora_rank :].unflatten(0, (2, half))
            rows.mul_(factor.view(half, *[1] * (tensor.ndim - 1)))
    for tensor in (queries.weight, queries.bias):
        if tensor is not None:
            rows = tensor.unflatten(0, (layer.num_heads, -1))[:, nope:].unflatten(1, (2, half))
            rows.div_(factor.view(half, *[1] * (tensor.ndim - 1)))


def _rms(weight: Tensor, *dims: int) -> Tensor:
    return weight.float().square().mean(dims).sqrt()


def _factor(first: Tensor, second: Tensor) -> Tensor:
    """What the first is to be multiplied and the second divided by; 1 where one of them is nothing."""
    return torch.where((first > 0) & (second > 0), (second / first).sqrt(), 1.0)
