"""Method `regress`: a layer's attention learns by gradient descent to give what the original's gives."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from attnzoo.conversion.calibration import LayerData
from attnzoo.conversion.families import Projections

STEPS = 150
RATE = 1e-2  # of a weight's root mean square, a step of Adam (arXiv 1412.6980)
WARMUP = 10

Named = Callable[[Projections], Mapping[str, Tensor]]  # projections -> tensors by their names inside the new module


def regress(p: Projections, data: LayerData, named: Named, seed: int, steps: int = STEPS) -> Projections:
    """q, k, v, o, biases and norms after `steps` steps on the squared error of the layer's output.

    Args:
        p: the layer's new weights to start from.
        data: with targets.
        named: how the new module names tensors.
        seed: of the order of batches.
    """
    start = {field.name: getattr(p, field.name) for field in fields(p) if getattr(p, field.name) is not None}
    learned = {name: tensor.to(data.device, torch.float32, copy=True) for name, tensor in start.items()}
    for tensor in learned.values():
        tensor.requires_grad_()
    sizes = {name: float(tensor.detach().square().mean().sqrt()) or 1e-3 for name, tensor in learned.items()}
    groups = [{"params": [learned[name]], "lr": RATE * size} for name, size in sizes.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    generator = torch.Generator().manual_seed((seed * 1_000_003 + data.number) % 2**63)
    energy = sum(float(data.target(batch).float().square().mean()) for batch in range(data.batches)) / data.batches
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(data.batches, generator=generator).tolist()
        batch = order.pop()
        with torch.autocast(data.device.type, torch.bfloat16, enabled=_halves_are_faster(data.device)):
            out = data.attend(named(replace(p, **learned)), batch)
        error = out.float() - data.target(batch).float()
        loss = error.square().mean() / max(energy, 1e-30)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return replace(p, **{name: tensor.detach().to(start[name]) for name, tensor in learned.items()})


def _halves_are_faster(device: torch.device) -> bool:
    """Whether bf16 products save time here; steps with a small error are as good as exact ones."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return True
