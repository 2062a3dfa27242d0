"""What a causal language model makes of its last hidden states, so that a loss can take the logits chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = 50.0  # the probe's logits are enlarged by it, or a softcap would hardly show in those of a small model


class Head(NamedTuple):
    """The logits are softcap * tanh(z / softcap) with z = logit_scale * (hidden @ weight.T + bias), or z itself."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal language model, with its parameters as they are now.

    Raises ValueError as `check_head` does, which is asked at a model's first call.
    """
    if model not in _RULES:
        check_head(model)
    output = model.get_output_embeddings()
    return Head(output.weight, output.bias, *_RULES[model])


def check_head(model: nn.Module) -> None:
    """Raise ValueError for a model whose logits are made in another way than `Head` says.

    The model itself is asked, once, on eight tokens: so no family is taken for another.
    """
    output = model.get_output_embeddings()
    backbone = getattr(model, "base_model", model)
    seen = None if type(output) is not nn.Linear or backbone is model else _probe(model, backbone, output)
    for scale, softcap in _candidates(model.config) if seen is not None else ():
        z = seen.raw * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        if _same(z, seen.logits):
            _RULES[model] = (softcap, scale)
            return
    raise ValueError(
        f"model: {type(model).__name__} does not make its logits by one matrix from its last hidden states, with at "
        "most a factor and a softcap; the losses need that"
    )


def rule_of(model: nn.Module) -> tuple[float | None, float] | None:
    """Softcap and factor that `check_head` has found, None for a model that was not asked."""
    return _RULES.get(model)


def adopt_rule(model: nn.Module, rule: tuple[float | None, float] | None) -> None:
    """Takes what another process has found of the same model, whose weights are not here to be asked."""
    if rule is not None:
        _RULES[model] = rule


class _Seen(NamedTuple):
    raw: Tensor  # enlarged products of hidden states and head, fp32
    logits: Tensor  # what the model made of them, fp32


# Softcap and factor of models that were asked.
_RULES: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()


@torch.no_grad()
def _probe(model: nn.Module, backbone: nn.Module, output: nn.Linear) -> _Seen | None:
    """None where the head takes something else than the last hidden states, or does more than multiply."""
    kept: dict[str, Any] = {}

    def at_backbone(module: nn.Module, args: Any, out: Any) -> None:
        kept["hidden"] = getattr(out, "last_hidden_state", None)

    def at_head(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        kept["input"], kept["raw"] = args[0], out
        return GAIN * out

    device = output.weight.device
    ids = torch.arange(8, device=device)[None] % output.weight.shape[0]
    hooks = [backbone.register_forward_hook(at_backbone), output.register_forward_hook(at_head)]
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids, use_cache=False).logits
            hidden, taken, raw = kept.get("hidden"), kept.get("input"), kept.get("raw")
            if hidden is None or taken is None or not torch.equal(hidden, taken):
                return None
            if not _same(raw.float(), F.linear(taken, output.weight, output.bias).float()):
                return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return _Seen(GAIN * raw.float(), logits.float())


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
