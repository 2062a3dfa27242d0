"""The calibration text's last word on a layer: least squares of its outputs, and some steps of descent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.calibration import LayerData
from attnzoo.conversion.latent.factor import LatentWeights

_RATE = 1e-2  # of a weight's usual size, a step


def refit_outputs(w: LatentWeights, data: LayerData, ridge: float = 1e-2) -> LatentWeights:
    """The output projection that brings the heads' outputs nearest to the target, held to what it was by `ridge`.

    Args:
        w: the layer's weights.
        data: inputs and targets.
        ridge: of the mean square of the heads' outputs, added to the diagonal.
    """
    tensors = _on(w, data)
    dim, width = w.o.shape
    has_bias = w.o_bias is not None
    gram = torch.zeros(width + has_bias, width + has_bias, dtype=torch.float64)
    cross = torch.zeros(dim, width + has_bias, dtype=torch.float64)
    old = torch.cat([w.o, w.o_bias[:, None]], dim=1) if w.o_bias is not None else w.o
    for batch in range(data.batches):
        z = data.inside(tensors, batch, "o_proj").flatten(0, 1)
        if has_bias:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        missing = data.target(batch).flatten(0, 1) - z @ old.to(z).T
        gram += (z.T @ z).to("cpu", torch.float64)
        cross += (missing.T @ z).to("cpu", torch.float64)
    damped = gram + ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    new = old + torch.linalg.solve(damped, cross.T).T.to(old)
    return replace(w, o=new[:, :width], o_bias=new[:, -1] if has_bias else None)


def regress(w: LatentWeights, data: LayerData, steps: int) -> LatentWeights:
    """Adam on all the layer's weights towards the target, a batch a step; what it was if that came nearer.

    Rates are a share of each tensor's own size, and fall to zero along a cosine.
    """
    start = _on(w, data)
    tensors = {name: t.clone().requires_grad_() for name, t in start.items()}
    groups = [
        {"params": [t], "lr": _RATE * float(t.detach().square().mean().sqrt().clamp(min=1e-8))}
        for t in tensors.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    size = sum(float(data.target(batch).square().mean()) for batch in range(data.batches)) / data.batches
    for step in range(steps):
        batch = step % data.batches
        loss = (data.attend(tensors, batch) - data.target(batch)).square().mean() / max(size, 1e-30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = {name: t.detach() for name, t in tensors.items()}
    return LatentWeights.of(found if _error(found, data) < _error(start, data) else start)


@torch.no_grad()
def _error(tensors: Mapping[str, Tensor], data: LayerData) -> float:
    return sum(
        float((data.attend(tensors, batch) - data.target(batch)).square().mean()) for batch in range(data.batches)
    )


def _on(w: LatentWeights, data: LayerData) -> dict[str, Tensor]:
    return {name: t.to(data.device, torch.float32) for name, t in w.named().items()}
