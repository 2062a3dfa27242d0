"""Layer by layer through a model: the text that a layer sees is gathered, the layer converted, and the result run.

Two models walk side by side, the original and the one that it becomes, of whatever class; each has one layer's weights
at a time. What the layers are turned into is a `LayerMethod`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnzoo.conversion.calibration import LayerData, LayerMethod, Progress
from attnzoo.conversion.damage import LayerDamage
from attnzoo.conversion.moments import Moments
from attnzoo.hf.calibration_received import Received, watching_attention
from attnzoo.hf.calibration_stage import Stage
from attnzoo.hf.calibration_store import Activations

TOKENS_AT_ONCE = 1024  # of a batch; bounds what a layer keeps in memory while it runs


@dataclass
class Walk:
    """The two streams of hidden states, of the calibration text first and of the held-out text behind it."""

    batches: list[Tensor]
    calibrating: int  # how many of the batches are calibration text
    original: Activations
    new: Activations


@torch.no_grad()
def convert_layers(
    original: Stage,
    new: Stage,
    method: LayerMethod,
    attention: Callable[[int], Mapping[str, Tensor]],
    calibration: Tensor | None,
    held_out: Tensor | None = None,
    *,
    finished: Callable[[int], Mapping[str, Tensor] | None] = lambda number: None,
    keep: Callable[[int, Mapping[str, Tensor]], None],
    storage: torch.dtype,
    spill: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[LayerDamage], Walk]:
    """Convert every layer behind the converted ones before it.

    Args:
        original, new: the two models. `new` is filled with its checkpoint's tensors and, for the attention, with what
            the method gave.
        method: called once a layer, in order; gets no data where there is no calibration text.
        attention: the original attention's tensors of a layer, by their names inside the module.
        calibration: token ids `[rows, S]`, no padding; None for a method that needs no text.
        held_out: token ids of text that shall only be run, not learned from; for the damage.
        finished: a layer's new tensors from an earlier run, or None; it is then run, not converted again.
        keep: called with a layer's number and new tensors, by full names, once they are known.
        storage: dtype of the hidden states between layers.
        spill: folder where activations may go that would fill the memory.
        progress: told after each layer.

    Returns:
        The damage of each layer (on the held-out text, if there is any), and the streams behind the last layer.
    """
    batches = [*_batches(calibration), *_batches(held_out)]
    calibrating = len(_batches(calibration))
    walk = Walk(
        batches, calibrating, _streams(original, batches, storage, spill), _streams(new, batches, storage, spill)
    )
    damages = []
    for number in range(len(original.layers)):
        tensors = finished(number)
        data = _Data(number, new, walk, method if tensors is None else None, storage, spill)
        _run_original(original, number, walk, data)
        start = time.perf_counter()
        if tensors is None:
            with torch.enable_grad():
                tensors = method(number, attention(number), data if calibrating else None)
        seconds = time.perf_counter() - start
        keep(number, tensors)
        errors = _run_new(new, number, tensors, walk, data)
        damages.append(LayerDamage(number, *errors, seconds))
        if progress is not None:
            progress(number + 1, len(original.layers))
    return damages, walk


def _batches(tokens: Tensor | None) -> Sequence[Tensor]:
    return () if tokens is None else tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))


def _streams(stage: Stage, batches: list[Tensor], storage: torch.dtype, spill: Path | None) -> Activations:
    streams = None
    for batch, hidden in enumerate(stage.embed(batches)):
        if streams is None:
            sizes = [(tokens.shape[0], tokens.shape[1]) for tokens in batches]
            streams = Activations(sizes, hidden.shape[-1], storage, spill)
        streams[batch] = hidden
    assert streams is not None
    return streams


def _run_original(stage: Stage, number: int, walk: Walk, data: _Data) -> None:
    """The original's layer: on its own stream, and its attention on what the new model's attention will get."""
    with stage.layer(number) as layer:
        attention = stage.attention_of(layer)
        for batch in range(len(walk.batches)):
            before = walk.original[batch].to(stage.device, stage.dtype)
            with _watching(attention) as seen:
                after = stage.run(layer, number, before)
            own = seen.output
            strayed = walk.new[batch].to(stage.device, stage.dtype)
            # Seeing the attention costs more than computing it, and only a method has use for it.
            watched = watching_attention() if data.gathers(batch) else nullcontext(Received())
            with watched as received, _watching(attention, stop="behind") as seen:
                stage.run(layer, number, strayed)
            data.gather(batch, seen.input, received.weights, seen.output, own, before - strayed)
            walk.original[batch] = after


def _run_new(stage: Stage, number: int, tensors: Mapping[str, Tensor], walk: Walk, data: _Data) -> tuple[float, float]:
    """The new layer on its stream; the errors of its attention and of the sum behind it."""
    judged = range(walk.calibrating, len(walk.batches)) or range(walk.calibrating)
    sums = torch.zeros(4, dtype=torch.float64)
    with stage.layer(number, tensors) as layer:
        attention = stage.attention_of(layer)
        for batch in range(len(walk.batches)):
            with _watching(attention) as seen:
                after = stage.run(layer, number, walk.new[batch])
            if batch in judged:
                true, truth = data.same[batch].to(after), walk.original[batch].to(after)
                terms = (seen.output - true, true, after - truth, truth)
                sums += torch.stack([term.double().square().sum() for term in terms]).cpu()
            walk.new[batch] = after
    tiny = torch.finfo(torch.float64).tiny
    return float(sums[0] / sums[1].clamp_min(tiny)), float(sums[2] / sums[3].clamp_min(tiny))


class _Data(LayerData):
    """Gathers while the original runs, then answers the method."""

    def __init__(
        self, number: int, new: Stage, walk: Walk, method: LayerMethod | None, storage: torch.dtype, spill: Path | None
    ) -> None:
        self.number, self.batches = number, walk.calibrating
        self.device, self.dtype = new.device, new.dtype
        self.moments, self.attended = (Moments(walk.new[0].shape[-1]) for _ in range(2))
        self._new, self._walk, self._wanted = new, walk, method.target if method else None
        self._gathers = method is not None
        self._calls: dict[int, tuple[tuple[Any, ...] | None, dict[str, Any]]] = {}
        self._storage, self._spill = storage, spill
        sizes = [(tokens.shape[0], tokens.shape[1]) for tokens in walk.batches]
        dim = walk.new[0].shape[-1]
        self.same = Activations(sizes, dim, storage, spill)
        calibrating = sizes[: walk.calibrating]
        keeps = self._wanted is not None
        self._inputs = Activations(calibrating, dim, storage, spill) if keeps else None
        self._targets = Activations(calibrating, dim, storage, spill) if keeps and self._wanted != "same" else None

    def gathers(self, batch: int) -> bool:
        """Whether a method will ask for what this batch says."""
        return self._gathers and batch < self.batches

    def gather(
        self, batch: int, x: Tensor, received: Tensor | None, same: Tensor, own: Tensor, strayed: Tensor
    ) -> None:
        self.same[batch] = same
        if not self.gathers(batch):
            return
        self.moments.add(x)
        self.attended.add(x, received)
        if self._inputs is not None:
            self._inputs[batch] = x
        if self._targets is not None:
            self._targets[batch] = own + strayed if self._wanted == "stream" else own

    def inputs(self, batch: int) -> Tensor:
        if self._inputs is None:
            raise ValueError("inputs are kept for methods that name a target only")
        return self._inputs[batch].to(self._new.device, self._new.dtype)

    def target(self, batch: int) -> Tensor:
        if self._wanted is None:
            raise ValueError("the method names no target, so no outputs were gathered")
        kept = self.same if self._targets is None else self._targets
        return kept[batch].to(self._new.device, self._new.dtype)

    def attend(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        attention, args, kwargs = self._attention(batch)
        return _first(functional_call(attention, dict(tensors), args, kwargs))

    def inside(self, tensors: Mapping[str, Tensor], batch: int, module: str) -> Tensor:
        attention, args, kwargs = self._attention(batch)
        with _watching(attention.get_submodule(module), stop="before") as found:
            functional_call(attention, dict(tensors), args, kwargs)
        return found.input

    def _attention(self, batch: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The new attention, and what it is called with: its inputs are not the original's where a norm was folded."""
        if not self._calls:
            sizes = [(len(tokens), tokens.shape[1]) for tokens in self._walk.batches[: self.batches]]
            self._own_inputs = Activations(sizes, self._walk.new[0].shape[-1], self._storage, self._spill)
            with self._new.layer(self.number, partly=True) as layer, torch.no_grad():
                attention = self._new.attention_of(layer)
                for number in range(self.batches):
                    with _watching(attention, stop="before") as seen:
                        self._new.run(layer, self.number, self._walk.new[number])
                    self._own_inputs[number] = seen.input
                    del seen.input
                    self._calls[number] = (seen.args[1:] if seen.args else None, _without_input(seen.kwargs))
        rest, kwargs = self._calls[batch]
        x = self._own_inputs[batch].to(self._new.device, self._new.dtype)
        args = () if rest is None else (x, *rest)
        kwargs = {**kwargs, "hidden_states": x} if rest is None else kwargs
        return self._new.attention_of(self._new.layers[self.number]), args, kwargs


class _Stop(Exception):
    """Enough has been seen."""


class _Seen:
    """What a module was called with, and what it gave."""

    input: Tensor
    output: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _without_input(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


@contextmanager
def _watching(module: nn.Module, stop: str = "") -> Iterator[_Seen]:
    """Sees a call of the module inside the block; `stop` ends the block "before" it or "behind" it."""
    seen = _Seen()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.input = args[0] if args else kwargs["hidden_states"]
        seen.args, seen.kwargs = args, kwargs
        if stop == "before":
            raise _Stop

    def behind(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen.output = _first(out)
        if stop == "behind":
            raise _Stop

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(behind)]
    try:
        yield seen
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
