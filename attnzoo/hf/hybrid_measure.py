"""What it costs to change a layer of a model: that layer alone, and all that were chosen together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.conversion.calibration import Progress
from attnzoo.conversion.damage import LayerDamage
from attnzoo.hf.blocks import Blocks, watching

_TOKENS = 512  # whose distributions are compared at once


@torch.no_grad()
def damage_alone(original: Blocks, changed: Blocks, tokens: Tensor, progress: Progress | None = None) -> list[float]:
    """The damage of each layer when it alone is changed: KL divergence of the next-token distribution, nats a token.

    Text runs through the original once; from each layer's own inputs on, it runs again behind the changed layer.

    Args:
        original, changed: the model, and the same with every layer changed.
        tokens: token ids `[rows, S]`, without padding.
        progress: told after each layer of each row.
    """
    count = len(original.blocks)
    sums = [0.0] * count
    for number, row in enumerate(tokens.split(1)):
        row = row.to(original.model.device)
        seen = original.watch(row)
        changed.prepare(row)
        for layer in range(count):
            hidden = changed.run(layer, seen.stream[layer])
            for later in range(layer + 1, count):
                hidden = original.run(later, hidden)
            sums[layer] += _kl(seen.logits, original.leave(hidden))
            if progress is not None:
                progress(number * count + layer + 1, count * len(tokens))
    return [total / tokens[:, 1:].numel() for total in sums]


@dataclass(frozen=True)
class Judged:
    """Nats a token: cross-entropy before and after, and the KL divergence of after from before; the tokens; the layers,
    each behind the changed ones before it."""

    before: float
    after: float
    kl: float
    tokens: int
    layers: list[LayerDamage]


@torch.no_grad()
def damage_together(original: Blocks, changed: Blocks, chosen: Collection[int], tokens: Tensor) -> Judged:
    """The damage when the chosen layers are changed; arguments as of `damage_alone`."""
    count = len(original.blocks)
    sums = torch.zeros(3, dtype=torch.float64)
    squares = torch.zeros(count, 4, dtype=torch.float64)
    for row in tokens.split(1):
        row = row.to(original.model.device)
        seen = original.watch(row)
        changed.prepare(row)
        hidden = seen.stream[0]
        for number in range(count):
            if number in chosen:
                with watching(original.attention(number)) as true:
                    original.run(number, hidden)
                with watching(changed.attention(number)) as attended:
                    hidden = changed.run(number, hidden)
                squares[number, :2] += _squares(attended[0], true[0])
            else:
                hidden = original.run(number, hidden)
            squares[number, 2:] += _squares(hidden, seen.stream[number + 1])
        logits, old = original.leave(hidden), seen.logits
        losses = [F.cross_entropy(one[0, :-1].float(), row[0, 1:], reduction="sum") for one in (old, logits)]
        sums += torch.tensor([*map(float, losses), _kl(old, logits)], dtype=torch.float64)
    number_of = tokens[:, 1:].numel()
    before, after, divergence = (sums / number_of).tolist()
    errors = (squares[:, ::2] / squares[:, 1::2].clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    layers = [LayerDamage(number, error[0], error[1], 0.0) for number, error in enumerate(errors)]
    return Judged(before, after, divergence, number_of, layers)


def _kl(old: Tensor, new: Tensor) -> float:
    """The summed divergence of next-token distributions, of logits `[1, S, vocabulary]`; the last token has none."""
    total = 0.0
    for some, other in zip(old[0, :-1].split(_TOKENS), new[0, :-1].split(_TOKENS), strict=True):
        before, after = (part.float().log_softmax(-1) for part in (some, other))
        total += float(F.kl_div(after, before, reduction="none", log_target=True).sum(-1).double().sum())
    return total


def _squares(found: Tensor, true: Tensor) -> Tensor:
    """Sums of squares of the error and of the truth."""
    return torch.stack([(found - true).double().square().sum(), true.double().square().sum()]).cpu()
