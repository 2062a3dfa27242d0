"""A causal language model taken apart at its blocks, which then run one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from attnzoo.conversion import ConversionError
from attnzoo.conversion.families import Family

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments behind the hidden states


@dataclass
class Seen:
    """One forward pass: the stream `[B, S, dim]` before each block and behind the last, and `logits [B, S, tokens]`."""

    stream: list[Tensor]
    logits: Tensor


class Blocks:
    """Runs a model's blocks. Masks and tables that they are called with are those of the batch's shape alone.

    Args:
        model: in eval mode.
        family: of its attention.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        path, _, self._inside = (family.base + family.attention).partition(".{layer}.")
        try:
            self.blocks = list(model.get_submodule(path))  # type: ignore[call-overload]
        except AttributeError:
            raise ConversionError(
                f"text runs through causal language models only, not {type(model).__name__}"
            ) from None
        self.model, self.family = model, family
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._tuples = False

    def attention(self, number: int) -> nn.Module:
        """The attention of a block."""
        return self.blocks[number].get_submodule(self._inside)

    def watch(self, tokens: Tensor) -> Seen:
        """Run the whole model on token ids `[B, S]`."""
        stream: list[Tensor] = []
        calls: list[Call] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(kwargs)
            hidden = args[0] if args else named.pop("hidden_states")
            stream.append(hidden)
            calls.append((args[1:], named))

        def last(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._tuples = isinstance(out, tuple)
            stream.append(_first(out))

        hooks = [self.blocks[-1].register_forward_hook(last)]
        hooks += [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        try:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        self._calls[tuple(tokens.shape)] = calls
        return Seen(stream, logits)

    def prepare(self, tokens: Tensor) -> None:
        """Learn what blocks are called with for batches of this shape, which `run` needs."""
        if tuple(tokens.shape) not in self._calls:
            self.watch(tokens)

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """The stream behind a block, from that before it."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][number]
        return _first(self.blocks[number](hidden, *args, **kwargs))

    def enter(self, tokens: Tensor) -> Tensor:
        """The stream before the first block, of token ids `[B, S]`."""
        self.prepare(tokens)
        with _stopping(self.blocks[0]) as found, suppress(_Stop):
            self.model(input_ids=tokens, use_cache=False)
        return found[0]

    def heads(self, number: int, hidden: Tensor) -> Tensor:
        """What the heads of a block's attention give, `[B, S, heads * head_dim]`, from the stream before the block.

        The attention is one of a swapped model, which has an o_proj.
        """
        with _stopping(self.attention(number).get_submodule("o_proj")) as found, suppress(_Stop):
            self.run(number, hidden)
        return found[0]

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits from the stream behind the last block."""
        out = (hidden,) if self._tuples else hidden
        for block in self.blocks:
            block.forward = lambda *args, **kwargs: out  # type: ignore[method-assign]
        try:
            return self.model(input_ids=hidden.new_zeros(hidden.shape[:2]).long(), use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module while this is open."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, args, out: found.append(_first(out)))
    try:
        yield found
    finally:
        hook.remove()


class _Stop(Exception):
    """What was looked for has been seen."""


@contextmanager
def _stopping(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module, which then stops the pass."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares all its tensors, in eval mode: for other layers over the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
