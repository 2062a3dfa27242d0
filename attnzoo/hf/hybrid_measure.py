"""What it costs to change a layer of a model: that layer alone, and all that were chosen together."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.conversion.calibration import Progress
from attnzoo.conversion.damage import LayerDamage
from attnzoo.hf.blocks import Blocks, Seen, watching

_TOKENS = 512  # whose distributions are compared at once


@torch.no_grad()
def damage_alone(
    original: Blocks, changed: Blocks, tokens: Tensor, progress: Progress | None = None
) -> tuple[list[float], list[LayerDamage]]:
    """The damage of each layer when it alone is changed.

    Text runs through the original once; from each layer's own inputs on, it runs again behind the changed layer.

    Args:
        original, changed: the model, and the same with every layer changed.
        tokens: token ids `[rows, S]`, without padding.
        progress: told after each layer of each row.

    Returns:
        The KL divergence of the final distribution from the original's, nats a token, layer by layer; and what the
        change does to the layer's attention and to the sum behind it.
    """
    count = len(original.blocks)
    divergence, seconds = torch.zeros(count, dtype=torch.float64), [0.0] * count
    sums = torch.zeros(count, 4, dtype=torch.float64)
    for number, row in enumerate(tokens.split(1)):
        row = row.to(original.model.device)
        seen = original.watch(row)
        changed.prepare(row)
        for layer in range(count):
            start = time.perf_counter()
            with watching(changed.attention(layer)) as attended:
                hidden = changed.run(layer, seen.stream[layer])
            sums[layer] += _squares(seen, layer, attended[0], hidden)
            for later in range(layer + 1, count):
                hidden = original.run(later, hidden)
            divergence[layer] += kl(seen.logits, original.leave(hidden))  # type: ignore[arg-type]
            seconds[layer] += time.perf_counter() - start
            if progress is not None:
                progress(number * count + layer + 1, count * len(tokens))
    tiny = torch.finfo(torch.float64).tiny
    errors = sums[:, ::2] / sums[:, 1::2].clamp_min(tiny)
    damages = [LayerDamage(n, float(errors[n, 0]), float(errors[n, 1]), seconds[n]) for n in range(count)]
    return (divergence / tokens[:, 1:].numel()).tolist(), damages


@dataclass(frozen=True)
class Judged:
    """Nats a token: cross-entropy before and after, and the KL divergence of after from before."""

    before: float
    after: float
    kl: float
    tokens: int


@torch.no_grad()
def damage_together(original: Blocks, changed: Blocks, chosen: Collection[int], tokens: Tensor) -> Judged:
    """The damage when the chosen layers are changed; arguments as of `damage_alone`."""
    sums = torch.zeros(3, dtype=torch.float64)
    for row in tokens.split(1):
        row = row.to(original.model.device)
        seen = original.watch(row)
        changed.prepare(row)
        hidden = seen.stream[0]
        for number in range(len(original.blocks)):
            hidden = (changed if number in chosen else original).run(number, hidden)
        logits, old = original.leave(hidden), seen.logits
        losses = [F.cross_entropy(one[0, :-1].float(), row[0, 1:], reduction="sum").double() for one in (old, logits)]  # type: ignore[index]
        sums += torch.stack([*losses, torch.tensor(kl(old, logits))]).cpu()  # type: ignore[arg-type]
    count = tokens[:, 1:].numel()
    before, after, divergence = (sums / count).tolist()
    return Judged(before, after, divergence, count)


def kl(old: Tensor, new: Tensor) -> float:
    """The summed divergence of next-token distributions, of logits `[1, S, vocabulary]`; the last token has none."""
    total = 0.0
    for some, other in zip(old[0, :-1].split(_TOKENS), new[0, :-1].split(_TOKENS), strict=True):
        before, after = (part.float().log_softmax(-1) for part in (some, other))
        total += float(F.kl_div(after, before, reduction="none", log_target=True).sum(-1).double().sum())
    return total


def _squares(seen: Seen, layer: int, attended: Tensor, hidden: Tensor) -> Tensor:
    true, truth = seen.attended[layer], seen.stream[layer + 1]
    terms = (attended - true, true, hidden - truth, truth)
    return torch.stack([term.double().square().sum() for term in terms]).cpu()
