"""A transformers model of which one layer at a time has weights: the classes' own code, with little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attnzoo.conversion import ConversionError
from attnzoo.conversion.families.code import Code
from attnzoo.hf.calibration_experts import fuse, fused_experts, in_module

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments behind the hidden states


class Stage:
    """A causal language model whose layers get their weights when they are on, and lose them after.

    Args:
        config: its config.json.
        weights: every tensor by its name in the checkpoint; read when it is asked for, so this may be a view of files.
        attention: path of a layer's attention in the model, as "model.layers.{layer}.self_attn".
        device, dtype: where and in what layers compute.
        code: where the model's class stands, if it is not one of transformers.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        attention: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        code: Code | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.model = _empty_model(dict(config), code)
        self.layers_path, _, self.attention = attention.partition(".{layer}.")
        self.layers: nn.ModuleList = self.model.get_submodule(self.layers_path)  # type: ignore[assignment]
        self._read = _readers(weights, self.model)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._as_tuple = False

    def embed(self, batches: list[Tensor]) -> Iterator[Tensor]:
        """What goes into the first layer, `[rows, S, dim]`, batch by batch, from token ids `[rows, S]`."""
        output = self.model.get_output_embeddings()
        tied = output is not None and bool(getattr(self.model.config, "tie_word_embeddings", False))
        skip = _names_of(self.model, output) if output is not None and not tied else set()
        with self._outside(skip):
            for tokens in batches:
                yield self._enter(tokens.to(self.device))

    def run(self, layer: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """A layer that is on, on the stream before it: the stream behind it."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][number]
        out = layer(hidden.to(self.device, self.dtype), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def layer(
        self, number: int, new: Mapping[str, Tensor] | None = None, *, partly: bool = False
    ) -> Iterator[nn.Module]:
        """A layer with its weights: the checkpoint's, and `new` (by full names) in their place.

        Raises ConversionError where a weight is missing, unless `partly`.
        """
        layer, path = self.layers[number], f"{self.layers_path}.{number}."
        read: dict[str, Callable[[], Tensor]] = {
            name: read for name, read in self._read.items() if name.startswith(path)
        }
        read |= {_in_model(name, self.model): _getter(new, name) for name in new} if new else {}
        try:
            self._fill(layer, {name.removeprefix(path): get for name, get in read.items()})
            if not partly:
                _check_filled(layer, path)
            yield layer
        finally:
            _empty(layer)

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """The attention inside a layer."""
        return layer.get_submodule(self.attention)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the stream behind the last layer to logits `[rows, S, vocabulary]`."""
        inputs, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False)) or output is inputs
        with self._outside(set() if tied else _names_of(self.model, inputs)):
            if tied and output is not None:
                output.weight = inputs.weight
            yield self._leave

    def _leave(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.device, self.dtype)
        passed = (hidden,) if self._as_tuple else hidden
        width = self.model.get_input_embeddings().weight.shape[-1]  # OPT's may be narrower than the stream
        with self._stand_in(lambda number, came, args, kwargs: passed):
            return self.model(inputs_embeds=hidden.new_zeros(*hidden.shape[:2], width), use_cache=False).logits

    def _enter(self, tokens: Tensor) -> Tensor:
        """Run all but the layers, and keep what each layer is called with; it depends on the shape alone."""
        shape = tuple(tokens.shape)
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(number: int, came: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if came.shape[:2] != shape:
                raise _OtherKind
            if not calls:
                first.append(came)
            calls.append((args, kwargs))
            return (came,) if self._as_tuple else came

        base = getattr(self.model, self.model.base_model_prefix)
        with self._stand_in(record):
            try:
                base(input_ids=tokens, use_cache=False)
            except _OtherKind:  # layers of this class return tuples
                self._as_tuple = True
                calls.clear()
                first.clear()
                base(input_ids=tokens, use_cache=False)
        self._calls.setdefault(shape, calls)
        return first[0]

    @contextmanager
    def _stand_in(self, forward: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Let a function answer for all layers."""

        def answer(number: int) -> Callable[..., Any]:
            return lambda hidden_states, *args, **kwargs: forward(number, hidden_states, args, kwargs)

        for number, layer in enumerate(self.layers):
            layer.forward = answer(number)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @contextmanager
    def _outside(self, skip: set[str]) -> Iterator[None]:
        """Whatever is not in a layer gets its weights, but for `skip`."""
        read = {
            name: read
            for name, read in self._read.items()
            if not name.startswith(self.layers_path + ".") and name not in skip
        }
        try:
            self._fill(self.model, read)
            yield
        finally:
            _empty(self.model)

    def _fill(self, module: nn.Module, read: Mapping[str, Callable[[], Tensor]]) -> None:
        places = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
        for name, get in read.items():
            if name not in places:
                continue  # tables that old checkpoints store beside the weights
            tensor = get()
            if places[name].shape != tensor.shape:
                raise ConversionError(
                    f"tensor {name} has shape {list(tensor.shape)}, its class says {list(places[name].shape)}"
                )
            tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            where, _, last = name.rpartition(".")
            owner = module.get_submodule(where)
            if last in owner._parameters:
                owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[last] = tensor
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.to(self.device)


class _OtherKind(Exception):
    """The model wants another kind of result from a layer."""


def _empty_model(config: dict[str, Any], code: Code | None) -> PreTrainedModel:
    for key in ("auto_map", "quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    model_type = config.pop("model_type")
    with init_empty_weights(include_buffers=False):
        if code is None:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
        else:
            module = import_module(code.module)
            name = next((name for auto, name in code.classes.values() if auto == "AutoModelForCausalLM"), None)
            if name is None:
                raise ConversionError(f"{model_type} has no causal language model, which is what text is run through")
            model = getattr(module, name)(getattr(module, code.config)(**config))
    return model.eval()


def _in_model(name: str, model: PreTrainedModel) -> str:
    """A tensor's name in the model; files saved from the base model alone lack its prefix."""
    prefix = model.base_model_prefix + "."
    top = name.partition(".")[0]
    return name if hasattr(model, top) or name.startswith(prefix) else prefix + name


def _names_of(model: nn.Module, module: nn.Module) -> set[str]:
    path = next(name for name, one in model.named_modules() if one is module)
    return {f"{path}.{name}" for name, _ in module.named_parameters()}


def _readers(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """Name in the model -> what reads it."""
    readers = {_in_model(in_module(name), model): _getter(weights, name) for name in weights}
    for name, parts in fused_experts(list(weights)).items():
        readers[_in_model(name, model)] = lambda parts=parts: fuse([[weights[one] for one in part] for part in parts])  # type: ignore[misc]
    return readers


def _getter(weights: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: weights[name]


def _check_filled(layer: nn.Module, path: str) -> None:
    missing = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    if missing:
        raise ConversionError(f"the checkpoint has no tensor {path}{missing[0]}, which its class needs")


def _empty(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
