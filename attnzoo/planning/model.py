"""A model on paper: its layers and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.planning.attention import Attention
from attnzoo.planning.weights import Weights


@dataclass(frozen=True)
class Layer:
    """Attention, and the parameters of the rest: MLP or experts, and norms."""

    attention: Attention
    rest: Weights


@dataclass(frozen=True)
class Model:
    """A causal language model.

    Attributes:
        model_type: as config.json has it.
        dim: hidden size.
        vocab_size: tokens.
        max_positions: what the config says it was made for; None: it does not say.
        layers: from the bottom up.
        head: final norm and output; tied embeddings are counted here, and only here.
        looked_up: parameters of which a token reads a row: positions, and embeddings that are not tied.
        notes: what the reader of any number should know.
    """

    model_type: str
    dim: int
    vocab_size: int
    max_positions: int | None
    layers: tuple[Layer, ...]
    head: Weights
    looked_up: int
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> Weights:
        """Parameters of the whole model."""
        parts = (layer.attention.weights(self.dim) + layer.rest for layer in self.layers)
        return sum(parts, self.head + Weights(self.looked_up))

    def cache_bytes(self, tokens: int, size: int) -> int:
        """What one sequence's caches take, of all layers, allocated for `tokens`, a number taking `size` bytes."""
        return sum(count * attention.cache_bytes(tokens, size) for attention, count in self.attentions.items())

    @property
    def attentions(self) -> dict[Attention, int]:
        """The different attentions, and how many layers have each."""
        counts: dict[Attention, int] = {}
        for layer in self.layers:
            counts[layer.attention] = counts.get(layer.attention, 0) + 1
        return counts
