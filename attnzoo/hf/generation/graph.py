"""A decoding step as one CUDA graph: captured once, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.caches import PagedCache, RollingCache
from attnzoo.hf.generation.cache import HeldCache
from attnzoo.hf.generation.device import Clock
from attnzoo.hf.generation.fused import fused
from attnzoo.hf.generation.layer import HeldLayer
from attnzoo.hf.recurrent_cache import RecurrentLayer

Choose = Callable[[Tensor], Tensor]


class Step:
    """One token a row through the model, everything that changes from step to step on the device.

    The first call runs the model (and compiles kernels), the second captures a graph, and from then on the graph is
    replayed. Without CUDA every call runs the model.

    Args:
        model: the decoder.
        cache: after the prompt. It counts on the device until `leave`.
        choose: the next token `[B]` of logits `[B, vocabulary]`, by tensor operations only; it becomes the next step's
            input. None: tokens are given.
        fuse: compile norms, MLPs and rotations into one kernel each (`torch.compile`, some seconds at first use).
    """

    def __init__(
        self, model: PreTrainedModel, cache: HeldCache, *, choose: Choose | None = None, fuse: bool = False
    ) -> None:
        self.model, self.cache, self.choose, self.fuse = model, cache, choose, fuse
        device = model.device
        self.tokens = torch.zeros(cache.rows, 1, dtype=torch.int64, device=device)
        self.clock = Clock([0] * cache.rows, device)
        self.logits = torch.empty(0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = self.room = 0
        self.entered = False

    def enter(self) -> None:
        """Take the lengths over from the host; before steps.

        Raises:
            ValueError: if steps over this cache cannot be captured.
        """
        if why := refusal(self.model, self.cache):
            raise ValueError(f"steps cannot be captured: {why}")
        self.cache.settle()
        self.clock.set(self.cache.row_lengths())
        self.room = self.cache.max_length - self.cache.get_seq_length()
        self.cache.stepping, self.entered = self, True
        for layer in self.cache.layers:
            if isinstance(layer, RecurrentLayer):
                layer.enter(self.clock.before)
            else:
                assert isinstance(layer, HeldLayer)
                if isinstance(layer.memory, PagedCache):
                    layer.memory.reserve(self.room)
                layer.enter(self.clock)

    def leave(self) -> None:
        """Give the lengths back to the host; after steps."""
        if self.entered:
            self.entered, steps = False, self.cache.ahead
            self.cache.stepping, self.cache.ahead = None, 0
            for layer in self.cache.layers:
                layer.leave(steps)  # type: ignore[union-attr]

    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        """Logits `[B, 1, vocabulary]` after `tokens [B, 1]`, valid until the next call; None: the token chosen last.

        Raises:
            ValueError: if the cache is full.
        """
        if not self.entered:
            self.enter()
        if self.cache.ahead >= self.room:
            raise ValueError(f"cache full: max_length is {self.cache.max_length}")
        if tokens is not None:
            self.tokens.copy_(tokens)
        if self.graph is not None:
            self.graph.replay()
        elif self.tokens.is_cuda and self.calls > 0:
            self._capture()
        else:
            self._warm()
        self.calls += 1
        self.cache.ahead += 1
        return self.logits

    def _run(self) -> None:
        out = self.model(
            input_ids=self.tokens, position_ids=self.clock.before[:, None], past_key_values=self.cache, use_cache=True
        )
        self.logits = out.logits
        if self.choose is not None:
            self.tokens.copy_(self.choose(self.logits[:, -1])[:, None])
        self.clock.tick()

    def _warm(self) -> None:
        with torch.no_grad(), fused(self.model, self.fuse):
            if not self.tokens.is_cuda:
                return self._run()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what libraries set up at first use must not be captured
                self._run()
            torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), fused(self.model, self.fuse), torch.cuda.graph(graph):
            self._run()
        self.graph = graph
        graph.replay()


def refusal(model: PreTrainedModel, cache: HeldCache) -> str | None:
    """Why steps over this cache cannot be captured; None if they can."""
    config: Any = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(part for part in ropes.values() if isinstance(part, dict))]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f"rope_type {rope['rope_type']!r} looks at positions on the host"
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            if layer.state is None or layer.record_past:
                return "a state that is not there yet, or recorded for assisted decoding, is made anew at each step"
        elif not isinstance(layer, HeldLayer) or layer.memory is None:
            return "the cache is empty: give it the prompt first"
        elif isinstance(layer.memory, RollingCache) and layer.memory.kept < layer.memory.window + layer.memory.margin:
            return "a rolling cache that was cropped has to fill up first"
    return None
