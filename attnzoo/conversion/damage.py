"""What a conversion has cost, in numbers: layer by layer, and on text that it has not seen."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerDamage:
    """One layer. Errors are sums of squares over those of the original: 0 is exact, 1 as far off as no output.

    attention_error: of the attention's output, against the original attention on the same inputs.
    stream_error: of the sum behind the layer, against the original model's.
    seconds: what converting it took, the running of the text not counted.
    """

    layer: int
    attention_error: float
    stream_error: float
    seconds: float


@dataclass(frozen=True)
class Damage:
    """A whole conversion.

    tokens: on which the rest was measured, held out or (`held_out` false) the calibration text itself.
    cross_entropy_before, cross_entropy: nats a token, of the original and of the result.
    kl: of the result's next-token distribution from the original's, nats a token.
    kv_bytes_before, kv_bytes: of the cache, a token.
    seconds: in all.
    """

    method: str
    layers: list[LayerDamage] = field(default_factory=list)
    tokens: int = 0
    held_out: bool = False
    cross_entropy_before: float = math.nan
    cross_entropy: float = math.nan
    kl: float = math.nan
    kv_bytes_before: int = 0
    kv_bytes: int = 0
    seconds: float = 0.0

    @property
    def perplexity_before(self) -> float:
        return math.exp(min(self.cross_entropy_before, 700))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.cross_entropy, 700))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, perplexities included."""
        return asdict(self) | {"perplexity_before": self.perplexity_before, "perplexity": self.perplexity}
