"""Launches of the kernels of the hybrid's window."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attnzoo.ops.linear.triton.launch import compute_type, launch, strides
from attnzoo.ops.linear.triton.shapes import Config, NearTiles, divide, near_tiles, power_of_two


class Near(NamedTuple):
    """A call's softmax over the last `window` keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    gain: Tensor
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    window: int
    scale: float
    config: Config

    def attend(self, out: Tensor, weights: Tensor, top: Tensor, arg: Tensor) -> None:
        """Write the outputs of the near keys alone, their weight, the largest score and its key."""
        from attnzoo.ops.linear.triton.kernels_near import near_attend

        q, k, v = self.q, self.k, self.v
        tiles, _, _ = near_tiles(self.config)
        self._launch(near_attend, tiles, q.shape[1], (q, k, v, self.gain, out, weights, top, arg), (q, k, v, out))

    def differentiate(
        self,
        d_out: Tensor,
        inverses: Tensor,
        dots: Tensor,
        top: Tensor,
        arg: Tensor,
        row_sums: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
        add: tuple[bool, bool],
    ) -> None:
        """Write the row sums, d_q and d_k, or add to what these hold, and add to d_v."""
        from attnzoo.ops.linear.triton.kernels_near_backward import near_grad_keys, near_grad_queries

        q, k, v = self.q, self.k, self.v
        (d_q, d_k, d_v), given = gradients, (q, k, v, d_out, self.gain, inverses, dots, top, arg, row_sums)
        _, by_queries, by_keys = near_tiles(self.config)
        self._launch(near_grad_queries, by_queries, q.shape[1], (*given, d_q), (q, k, v, d_out, d_q), ADD=add[0])
        self._launch(near_grad_keys, by_keys, k.shape[1], (*given, d_k, d_v), (q, k, v, d_out, d_k, d_v), ADD=add[1])

    def _launch(
        self,
        kernel: Any,
        tiles: NearTiles,
        heads: int,
        arguments: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        **more: Any,
    ) -> None:
        length = self.q.shape[2]
        parts = divide(self.q.shape[0], length, tiles.rows, self.cu_seqlens)
        where = (self.lengths, self.cu_seqlens, parts.table)
        sizes = (length, parts.parts, parts.part, self.window, self.scale)
        options = near_constants(self.config, tiles, self.q.shape[3], GROUP=self.q.shape[1] // self.k.shape[1], **more)
        launch(kernel, (parts.programs, heads), *arguments, *where, *strides(*strided), *sizes, **options)


def near_constants(config: Config, tiles: NearTiles, dim: int, **more: Any) -> dict[str, Any]:
    """Constants and launch options for keys of `dim`."""
    return more | {
        "D": dim,
        "DV": config.v_dim,
        "BD": power_of_two(dim, config.least),
        "BV": power_of_two(config.v_dim, config.least),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "COMPUTE": compute_type(config),
        "PRECISION": config.precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
