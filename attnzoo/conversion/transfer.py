"""Attention transfer: a linear layer's feature maps learn each head's softmax output (Hedgehog, LoLCATs, 2410.10254).

Queries, keys, values and outputs stay as they are; what is trained is what the linear layer has beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnzoo.layers import LinearAttention

STEPS = 150
RATE = 1e-2  # of Adam, falling to 0 linearly


def learned(layer: LinearAttention) -> dict[str, nn.Parameter]:
    """The parameters that transfer trains, by name; none of an elementwise map without a window."""
    return {name: parameter for name, parameter in layer.named_parameters() if is_learned(name)}


def is_learned(name: str) -> bool:
    """Whether a tensor of this name inside a linear layer is its feature map's, or its window's."""
    return name == "window_factors" or name.startswith("learned_map.")


def transfer(
    layer: LinearAttention,
    heads: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
) -> None:
    """Train a layer's maps, in place, to give the targets.

    The error is the mean square over all heads, tokens and channels; a step sees one batch. Maps are trained in fp32
    (fp64), whatever their dtype is after. No gradient of another parameter is touched.

    Args:
        layer: the linear layer; it keeps its dtype.
        heads: the heads' outputs of `layer` on a batch, what goes into its o_proj; gradients flow to its maps.
        targets: of each batch, the softmax heads' outputs in the same layout.
        steps: of Adam.
        rate: of Adam at first.
        seed: of the batches' order.
    """
    parameters = learned(layer)
    if not parameters or steps < 1:
        return
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    trained = list(parameters.values())
    power = torch.stack([target.float().square().mean() for target in targets]).mean().clamp_min(1e-30)
    optimizer = torch.optim.Adam(trained, lr=rate)
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            queue = queue or torch.randperm(len(targets), generator=order).tolist()
            batch = queue.pop()
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            loss = (heads(batch).float() - targets[batch].float()).square().mean() / power
            # Not backward(): the other weights are the original model's, and so are their gradients.
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.data = parameter.data.to(dtypes[name])
