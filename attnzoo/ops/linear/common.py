"""What the linear backends share: the validated call, the elementwise feature maps, and the normalisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("identity", "elu", "relu")


class State(NamedTuple):
    """What is left of the keys and values seen so far, in fp32 (fp64 for fp64 inputs)."""

    s: Tensor  # [N, Hk, D, Dv]: the sum of decay^age * map(k) v^T
    z: Tensor | None  # [N, Hk, D]: the sum of decay^age * map(k); None without the normaliser


class Call(NamedTuple):
    """One call of `linear_attention`, validated and with its defaults filled in; what backends judge and run."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hk, Sk, D]
    v: Tensor  # [B, Hk, Sk, Dv]
    feature_map: str
    normalize: bool
    causal: bool
    scale: float  # 1 with the normaliser, where it cancels
    log_decay: Tensor | None = None  # [Hk]
    key_lengths: Tensor | None = None  # [B]
    cu_seqlens: Tensor | None = None  # [N + 1]
    initial: State | None = None

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sequences(self) -> int:
        """N: states that there are, one a row or one a packed document."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def apply_map(feature_map: str, x: Tensor) -> Tensor:
    """Features of `x`, elementwise: elu(x) + 1 (arXiv 2006.16236), relu(x), or x itself."""
    if feature_map == "elu":
        return F.elu(x) + 1
    return F.relu(x) if feature_map == "relu" else x


def map_slope(feature_map: str, x: Tensor) -> Tensor | float:
    """The derivative of `apply_map` at `x`."""
    if feature_map == "elu":
        return torch.exp(x.clamp(max=0))
    return (x > 0).to(x.dtype) if feature_map == "relu" else 1.0


def inverse_or_zero(total: Tensor) -> Tensor:
    """1 / total, and 0 where the total is 0: a query that no key answers gives 0, not NaN."""
    return torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))


def empty_state(call: Call, dtype: torch.dtype) -> State:
    """The state before the first token."""
    heads, dim = call.k.shape[1], call.k.shape[3]
    s = call.k.new_zeros(call.sequences, heads, dim, call.v.shape[3], dtype=dtype)
    return State(s, s.new_zeros(call.sequences, heads, dim) if call.normalize else None)
