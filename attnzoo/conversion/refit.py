"""Method `refit`: what the new heads give is known once they are there, so o_proj is fitted to it anew."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.calibration import LayerData
from attnzoo.conversion.families import Projections

# Of the mean energy of the heads' outputs: how hard it is to leave the o that came.
RIDGE = 0.03

Named = Callable[[Projections], Mapping[str, Tensor]]  # projections -> tensors by their names inside the new module


@torch.no_grad()
def refit(p: Projections, data: LayerData, named: Named, output: str) -> Projections:
    """o, and its bias if it has one, by ridge regression from the new heads' outputs to the original's.

    Args:
        p: the layer's new weights.
        data: with targets.
        named: how the new module names tensors.
        output: the path of its output projection.
    """
    tensors = {name: tensor.to(data.dtype) for name, tensor in named(p).items()}
    products = targets = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch in range(data.batches):
        heads = data.inside(tensors, batch, output).flatten(0, -2).float()
        if p.o_bias is not None:
            heads = torch.cat((heads, heads.new_ones(len(heads), 1)), dim=1)
        products = products + (heads.t() @ heads).to("cpu", torch.float64)
        targets = targets + (heads.t() @ data.target(batch).flatten(0, -2).float()).to("cpu", torch.float64)
        count += len(heads)
    width = p.o.shape[1] * p.o.shape[2]
    before = p.o.flatten(1).t().to("cpu", torch.float64)  # [H * D, dim]
    if p.o_bias is not None:
        before = torch.cat((before, p.o_bias.to("cpu", torch.float64)[None]))
    ridge = RIDGE * products.diagonal()[:width].mean() * torch.eye(len(products), dtype=torch.float64)
    new = torch.linalg.solve(products + ridge, targets + ridge @ before)
    bias = None if p.o_bias is None else new[width].to(p.o_bias)
    return replace(p, o=new[:width].t().reshape(p.o.shape).to(p.o), o_bias=bias)
