"""What the backward of linear attention is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnzoo.ops.linear.triton.launch import rows_contiguous


class Given(NamedTuple):
    """Inputs, outputs and their gradients; what there is not is None or empty."""

    d_out: Tensor
    d_s1: Tensor | None
    d_z1: Tensor | None
    out: Tensor
    inverses: Tensor
    s1: Tensor
    z1: Tensor
    sums: Tensor
    z_sums: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    s0: Tensor | None
    z0: Tensor | None
    log_decay: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None

    def tidy(self) -> Given:
        """With strides that the kernels take."""
        q, k, v, d_out = (rows_contiguous(t) for t in (self.q, self.k, self.v, self.d_out))
        states = (self.s0, self.z0, self.d_s1, self.d_z1)
        s0, z0, d_s1, d_z1 = (None if t is None else t.contiguous() for t in states)
        return self._replace(q=q, k=k, v=v, d_out=d_out, s0=s0, z0=z0, d_s1=d_s1, d_z1=d_z1)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]
