"""Second moments of what flows into a layer: all that the closed-form methods need to know of the calibration text."""

import torch
from torch import Tensor


class Moments:
    """Streams rows x and keeps the mean of x' x'^T, where x' is x with a 1 behind it, so that biases need no care.

    Sums are in fp64 on the CPU, products in fp32 (fp64 for fp64 rows) where the rows are.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0.0
        self._sum = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Count rows `[..., dim]`, each once, or with its weight `[...]`."""
        rows = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
        weighed = rows if weights is None else rows * weights.reshape(-1, 1).to(rows)
        self._sum += (rows.t() @ weighed).to("cpu", torch.float64)
        self.count += len(rows) if weights is None else float(weights.sum())

    def second(self, damping: float = 0.0) -> Tensor:
        """E[x' x'^T] `[dim + 1, dim + 1]` in fp64; `damping` times the mean variance is added to the diagonal of x."""
        if not self.count:
            raise ValueError("no rows were added, so there are no moments")
        moment = self._sum / self.count
        if damping:
            diagonal = moment.diagonal()
            diagonal[:-1] += damping * diagonal[:-1].mean()
        return moment

    def factor(self, damping: float = 1e-4) -> Tensor:
        """L `[dim + 1, dim + 1]`, lower triangular, with L L^T the damped second moment: ||W L|| is the size of W x."""
        moment = self.second(damping)
        # A bias without any variance around it would make the last pivot zero.
        moment[-1, -1] += damping
        return torch.linalg.cholesky(moment)
