"""A causal language model as a backbone and a linear head, so that a loss can take the head's logits chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = 50.0  # the probe's logits are enlarged by it, or a softcap would hardly show in those of a small model


@dataclass(frozen=True)
class Head:
    """`hidden(...)` times the output embeddings, and what the family does to the logits.

    The logits are softcap * tanh(z / softcap) with z = logit_scale * (hidden @ weight.T + bias), or z itself.
    """

    backbone: nn.Module
    output: nn.Linear
    softcap: float | None
    logit_scale: float

    def hidden(self, **inputs: Any) -> Tensor:
        """What the head is applied to, `[B, S, D]`, of the inputs that the whole model would get."""
        return self.backbone(**inputs).last_hidden_state

    def arguments(self) -> dict[str, Any]:
        """weight, bias, softcap and logit_scale, as the losses of `recipes.losses` take them."""
        numbers = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        return {"weight": self.output.weight, "bias": self.output.bias, **numbers}


def find_head(model: nn.Module) -> Head | None:
    """The head of a transformers causal language model, or None where its logits are made in another way.

    The model itself is asked, once, on eight tokens: its logits have to be what `Head` says of them. Ask before
    `torch.compile` and before the weights are shared out over devices.
    """
    output = model.get_output_embeddings()
    backbone = model.base_model if hasattr(model, "base_model") else None
    if type(output) is not nn.Linear or backbone is None or backbone is model:
        return None
    seen = _probe(model, backbone, output)
    if seen is None:
        return None
    raw, logits = seen
    for scale, softcap in _candidates(model.config):
        z = raw * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        if _same(z, logits):
            return Head(backbone, output, softcap, scale)
    return None


@torch.no_grad()
def _probe(model: nn.Module, backbone: nn.Module, output: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Enlarged products of hidden states and head, and the logits that the model makes of them; fp32.

    None where the head does not take the backbone's last hidden states as they are, or does more than multiply.
    """
    seen: dict[str, Any] = {}

    def at_backbone(module: nn.Module, args: Any, out: Any) -> None:
        seen["hidden"] = getattr(out, "last_hidden_state", None)

    def at_head(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen["input"], seen["raw"] = args[0], out
        return GAIN * out

    device = output.weight.device
    ids = torch.arange(8, device=device)[None] % output.weight.shape[0]
    hooks = [backbone.register_forward_hook(at_backbone), output.register_forward_hook(at_head)]
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits
            hidden, taken, raw = seen.get("hidden"), seen.get("input"), seen.get("raw")
            if hidden is None or taken is None or not torch.equal(hidden, taken):
                return None
            if not _same(raw.float(), F.linear(taken, output.weight, output.bias).float()):
                return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return GAIN * raw.float(), logits.float()


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """Factors and softcaps that a configuration may mean, the plainest first."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def read(*names: str) -> list[float]:
        return [float(value) for name in names if (value := getattr(config, name, None))]

    factors = read("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    factors = [1.0, *factors, *(1 / factor for factor in factors)]
    caps = [None, *read("final_logit_softcapping", "logits_soft_cap", "softcap")]
    yield from product(factors, caps)


def _same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors differ by no more than bf16's rounding, of which the model may have done a few."""
    return got.shape == want.shape and bool((got - want).abs().max() <= 0.02 * want.abs().max())
