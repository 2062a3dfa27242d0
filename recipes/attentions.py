"""A model's attention modules, whatever their mechanism, and what goes into them and comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ADDS_THE_STREAM = ("bloom", "bloom_gqa")  # their attention's output holds the residual stream


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, in order. ValueError for a family that `attnzoo` does not know."""
    from attnzoo.conversion.families import family_for
    from attnzoo.hf.auto import stock_type

    model_type = stock_type(str(model.config.model_type))
    family = family_for(model_type)
    count = family.geometry(model.config.to_dict() | {"model_type": model_type}).num_layers
    return [model.get_submodule(family.attention_path(number)) for number in range(count)]


def changed_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    """The numbers of the layers whose attention is another than the teacher's; all of them where none is."""
    pairs = list(zip(attention_modules(student), attention_modules(teacher), strict=True))
    configs = student.config.to_dict(), teacher.config.to_dict()
    changed = [number for number, pair in enumerate(pairs) if not _same(pair, number, configs)]
    return changed or list(range(len(pairs)))


class Watch:
    """What attention modules get and give while `watching` is open, `[1, T, dim]`, by the number of the layer.

    A batch that goes through the model in pieces is put together again.
    """

    def __init__(self) -> None:
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs: dict[int, list[Tensor]] = {}

    def input(self, layer: int) -> Tensor:
        return _joined(self._inputs[layer])

    def output(self, layer: int) -> Tensor:
        return _joined(self._outputs[layer])


@contextmanager
def watching(modules: Sequence[nn.Module], layers: Sequence[int], *, inputs: bool = False) -> Iterator[Watch]:
    """Watches these layers; compiled code, which does not see hooks that come later, is left aside meanwhile."""
    watch = Watch()

    def before(layer: int) -> Callable[..., None]:
        return lambda _, args, kwargs: watch._inputs.setdefault(layer, []).append(_hidden(args, kwargs))

    def after(layer: int) -> Callable[..., None]:
        return lambda _, args, out: watch._outputs.setdefault(layer, []).append(_first(out))

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            if inputs:
                hook = modules[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(modules[layer].register_forward_hook(after(layer)).remove)
        yield watch


@contextmanager
def feeding(model: PreTrainedModel, modules: Sequence[nn.Module], inputs: dict[int, Tensor]) -> Iterator[None]:
    """Gives attention modules other inputs `[1, T, dim]` than the model does.

    Meanwhile plain MLPs do nothing, since nothing depends on them, and no block is checkpointed, since that would run
    it again without the other inputs.
    """
    taken = dict.fromkeys(inputs, 0)

    def instead(layer: int) -> Callable[..., tuple[Any, Any]]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            own = _hidden(args, kwargs)
            piece = slice(taken[layer], taken[layer] + own.shape[1])
            taken[layer] = piece.stop
            other = inputs[layer][:, piece].to(own.dtype)
            return ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": other})

        return hook

    checkpointed = [block for block in model.modules() if getattr(block, "gradient_checkpointing", False)]
    plain = [module for module in model.modules() if type(module).__name__.endswith("MLP")]
    with ExitStack() as stack:
        for layer in inputs:
            hook = modules[layer].register_forward_pre_hook(instead(layer), with_kwargs=True)
            stack.callback(hook.remove)
        for mlp in plain:
            mlp.forward = lambda hidden, *args, **kwargs: hidden  # type: ignore[method-assign]
            stack.callback(delattr, mlp, "forward")
        for block in checkpointed:
            block.gradient_checkpointing = False  # type: ignore[assignment]
            stack.callback(setattr, block, "gradient_checkpointing", True)
        yield


def _same(pair: tuple[nn.Module, nn.Module], number: int, configs: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    """Whether two layers are softmax attention of the same weights under the same mask."""
    from attnzoo.hf.linear import SwappedLinearAttention
    from attnzoo.hf.plan import mask_of

    if any(isinstance(module, SwappedLinearAttention) for module in pair):
        return False
    weights, others = (dict(module.named_parameters()) for module in pair)
    if weights.keys() != others.keys():
        return False
    masks = [mask_of(module, number, config) for module, config in zip(pair, configs, strict=True)]
    return masks[0] == masks[1] and all(
        weight.shape == others[name].shape and torch.equal(weight.to(others[name].dtype), others[name])
        for name, weight in weights.items()
    )


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
