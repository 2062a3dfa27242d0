"""Values less their mean, for the backward in fp32.

The weight of key j has the gradient do_i . (v_j - out_i). Summed over keys that is the difference of two sums which
grow with the values' mean, and loses the digits that they share; plain PyTorch subtracts first. With the normaliser
nothing changes if all values and outputs are less by one vector, so the kernels are given values around 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear.common import inverse_or_zero
from attnzoo.ops.linear.triton.forward import attend
from attnzoo.ops.linear.triton.given import Given
from attnzoo.ops.linear.triton.shapes import Config


def worthwhile(config: Config, feature_map: str, normalize: bool) -> bool:
    """Whether fp32's last digits are at stake, and the weights are of one sign, so that there is a mean."""
    return normalize and feature_map != "identity" and config.compute == torch.float32 and config.precision != "tf32"


def mean_values(x: Given) -> Tensor:
    """`[Hk, Dv]`: the values' mean as the keys weigh them."""
    return x.s1.sum((0, 2)) * inverse_or_zero(x.z1.sum((0, 2)))[:, None]


def centred(x: Given, mean: Tensor, feature_map: str, causal: bool) -> Given:
    """The same call with values, outputs and states (s - z mean^T) less the mean, found anew for their last digits."""
    v = x.v - mean[:, None]
    s0 = None if x.s0 is None or x.z0 is None else x.s0 - x.z0[..., None] * mean[:, None]
    out, _, s1, _, sums, _ = attend(
        x.q, x.k, v, s0, x.z0, x.log_decay, x.lengths, x.cu_seqlens, feature_map, True, causal, 1.0
    )
    d_z1 = x.d_z1
    if x.d_s1 is not None:
        d_z1 = passed_on(x.d_s1, mean) + (0 if x.d_z1 is None else x.d_z1)
    return x._replace(v=v, out=out, s0=s0, s1=s1, d_z1=d_z1, sums=sums)


def passed_on(d_s: Tensor, mean: Tensor) -> Tensor:
    """`[N, Hk, D]`: what a gradient of s - z mean^T takes from z's, and one of s adds to it."""
    return (d_s * mean[:, None]).sum(-1)
