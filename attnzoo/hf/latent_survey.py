"""Which of a model's frequencies the rope part keeps: the same in all layers, as a stock config has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attnzoo.conversion.latent import RopePart, planes_of
from attnzoo.conversion.latent.costs import Inputs, value_costs, widened
from attnzoo.conversion.latent.method import Split, in_halves, without_norms
from attnzoo.conversion.moments import Moments
from attnzoo.hf.calibration_received import watching_attention
from attnzoo.hf.calibration_stage import Stage

_TOKENS = 8192  # that are enough to rank a few dozen planes


@torch.no_grad()
def worthiest_frequencies(
    stage: Stage,
    split: Split,
    attention: Callable[[int], Mapping[str, Tensor]],
    tokens: Tensor,
    rope: RopePart,
    scale: Sequence[float],
    count: int,
) -> tuple[int, ...]:
    """The `count` planes that lose most without rotation, summed over the layers, as rising indices of frequencies.

    Args:
        stage: the original model.
        split, scale: as `ToLatent` has them.
        attention: a layer's tensors.
        tokens: calibration text `[rows, S]`; its first rows are run.
        rope: what rotates; its planes do not matter.
        count: half the rope dimensions.
    """
    batches = [row[None] for row in tokens[: max(1, _TOKENS // tokens.shape[1])]]
    streams = list(stage.embed(batches))
    worth = torch.zeros(())
    for number in range(len(stage.layers)):
        p, rotary = split(number, attention(number))
        p = in_halves(p, rotary)
        streams, inputs = _through(stage, number, streams, p.q.device)
        wide, found = without_norms(p, inputs.asking.to(p.q.device)), inputs.damped()
        values = widened(wide.v, wide.v_bias)
        size = (
            value_costs(wide) * (values @ found.attended @ values.mT)
        ).sum()  # of the outputs, so that layers compare
        worth = worth + (planes_of(wide, found, rope.rotary_dim, scale[number]).worth / size).cpu()
    # `blind` has the square of the tables' factor in it, which what is lost of a rotation is measured against.
    kept = rope.blind.abs().square().cpu() / rope.blind.abs().square().max().clamp(min=1).cpu()
    lost = worth * (1 - kept)[:, None]
    best = lost.flatten().argsort(descending=True, stable=True)[:count] // worth.shape[1]
    return tuple(sorted(best.tolist()))


def _through(stage: Stage, number: int, streams: list[Tensor], device: torch.device) -> tuple[list[Tensor], Inputs]:
    """The streams behind a layer, and the moments of what its attention got."""
    inputs: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    asking, attended = (Moments(streams[0].shape[-1]) for _ in range(2))
    behind = []
    with stage.layer(number) as layer:
        hook = stage.attention_of(layer).register_forward_pre_hook(see, with_kwargs=True)
        for stream in streams:
            with watching_attention() as received:
                behind.append(stage.run(layer, number, stream))
            asking.add(inputs[-1])
            attended.add(inputs.pop(), received.weights)
        hook.remove()
    return behind, Inputs(asking.second().to(device), attended.second().to(device))
