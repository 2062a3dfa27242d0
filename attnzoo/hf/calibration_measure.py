"""What the converted model says of text, beside what the original says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.hf.calibration import Walk
from attnzoo.hf.calibration_stage import Stage


@torch.no_grad()
def measure(original: Stage, new: Stage, walk: Walk) -> tuple[float, float, float, int]:
    """Cross-entropies before and after, and the KL divergence of the new from the old, in nats a token; and the tokens.

    On the held-out text, or on the calibration text where there is no other.
    """
    judged = range(walk.calibrating, len(walk.batches)) or range(walk.calibrating)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with original.head() as before, new.head() as after:
        for batch in judged:
            for row, tokens in enumerate(walk.batches[batch]):  # logits are large, so a row at a time
                some = slice(row, row + 1)
                sums += _row(before(walk.original[batch][some]), after(walk.new[batch][some]), tokens)
                count += len(tokens) - 1
    old, now, divergence = (sums / max(count, 1)).tolist()
    return old, now, divergence, count


def _row(before: Tensor, after: Tensor, tokens: Tensor) -> Tensor:
    old, new = (logits[0, :-1].float().log_softmax(-1) for logits in (before, after))
    following = tokens[1:].to(old.device)
    losses = [F.nll_loss(one, following, reduction="sum") for one in (old, new)]
    return torch.stack([*losses, F.kl_div(new, old, reduction="sum", log_target=True)]).double().cpu()
