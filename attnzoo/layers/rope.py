"""Rotary position embedding (RoFormer, arXiv:2104.09864): half-split or interleaved, partial, scaled.

    half         pairs (x[0], x[r/2]), (x[1], x[r/2 + 1]), ...    Llama, Mistral, Qwen, Gemma, GPT-NeoX, Phi
    interleaved  pairs (x[0], x[1]), (x[2], x[3]), ...            GPT-J, the original paper

The first `r = rotary_dim` dimensions of a head are rotated, the others pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attnzoo.layers.frequencies import attention_factor, frequencies, read_scaling

Layout = Literal["half", "interleaved"]


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions; `apply_rotary` rotates by them.

    Args:
        head_dim: size of a head.
        base: wavelength base, `rope_theta`. None: the scaling's `rope_theta`, else 10000.
        rotary_dim: how many leading dimensions rotate, even. None: `head_dim` times the scaling's
            `partial_rotary_factor`, else all.
        layout: "half" or "interleaved".
        scaling: dictionary in the form of transformers' `rope_parameters`, of type default, linear, dynamic, llama3
            or yarn.
        max_position_embeddings: the model's; where dynamic scaling starts, and what yarn without a factor aims at.

    Attributes: `inv_freq [rotary_dim / 2]` fp32, which stays fp32 when the module is cast; `attention_factor`, which
    multiplies cosines and sines (1 except under yarn).

    Dynamic scaling takes its frequencies from the length of each sequence in the call, so past the trained length keys
    that are in a cache were rotated by other frequencies than new ones, as in transformers.
    """

    inv_freq: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = None,
        rotary_dim: int | None = None,
        layout: Layout = "half",
        scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.scaling = read_scaling(scaling, max_position_embeddings)
        theta = self.scaling.get("rope_theta")
        if base is not None and theta is not None and base != theta:
            raise ValueError(f"base is {base} but scaling['rope_theta'] is {theta}; give one of them")
        self.base = float(base if base is not None else theta if theta is not None else 10000.0)
        if rotary_dim is None:
            rotary_dim = int(head_dim * self.scaling.get("partial_rotary_factor", 1.0))
        least = 4 if self.scaling["rope_type"] == "dynamic" else 2
        if rotary_dim % 2 or not least <= rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and from {least} to head_dim ({head_dim})")
        if layout not in get_args(Layout):
            raise ValueError(f"layout is {layout!r}; allowed are {', '.join(map(repr, get_args(Layout)))}")
        self.head_dim, self.rotary_dim, self.layout = head_dim, rotary_dim, layout
        self.attention_factor = attention_factor(self.scaling)
        self.register_buffer("inv_freq", frequencies(rotary_dim, self.base, self.scaling), persistent=False)

    def forward(
        self, positions: Tensor, *, lengths: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`.

        Args:
            positions: integers of any shape `[...]`.
            lengths: tokens in the sequence that each position belongs to, broadcastable to `positions`; only dynamic
                scaling reads it. None: the largest position of each row, plus one.
            dtype: torch.float64 computes frequencies and angles in fp64, for fp64 inputs.

        Returns:
            `cos, sin`, each `[..., rotary_dim / 2]` of `dtype`.
        """
        inverse = self.inv_freq
        if self.scaling["rope_type"] == "dynamic":
            if lengths is None:
                lengths = positions.amax(dim=-1, keepdim=True) + 1
            inverse = self._frequencies(positions.device, dtype, lengths)
        elif dtype == torch.float64:
            inverse = self._frequencies(positions.device, dtype)
        angles = positions.unsqueeze(-1).to(inverse.dtype) * inverse
        factor = self.attention_factor
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def extra_repr(self) -> str:
        return f"rotary_dim={self.rotary_dim}, base={self.base}, layout={self.layout}, scaling={self.scaling}"

    def _frequencies(self, device: torch.device, dtype: torch.dtype, lengths: Tensor | None = None) -> Tensor:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        return frequencies(self.rotary_dim, self.base, self.scaling, lengths=lengths, dtype=precise, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # model.bfloat16() would round the frequencies, and to_empty() would leave them unset: make them anew.
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies(self.inv_freq.device, torch.float32)
        return self


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout = "half") -> Tensor:
    """Rotate the leading `2 * cos.shape[-1]` dimensions of each head; computed in the wider of both dtypes.

    Args:
        x: `[B, H, S, D]`.
        cos: `[S, R]` or `[B, S, R]` with `2 R <= D`, from `RotaryEmbedding`.
        sin: as `cos`.
        layout: "half" or "interleaved".

    Returns:
        `[B, H, S, D]` of x's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [B, 1, S, R]
    if layout == "half":
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    out = torch.cat(turned, dim=-1) if layout == "half" else torch.stack(turned, dim=-1).flatten(-2)
    out = out.to(x.dtype)
    return torch.cat([out, rest], dim=-1) if rest.shape[-1] else out
