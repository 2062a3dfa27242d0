"""Specs name an attention mechanism, without any weights: what swap, convert, export and the recipes' configs speak.

A field that is None stays as the model has it. A spec round-trips through `to_dict` and `spec_from_dict`, and so
through YAML and config.json. A list of specs is one per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from attnzoo.masks import Mask, mask_from_dict


@dataclass(frozen=True)
class Spec:
    """Base of all specs. Specs are frozen dataclasses, so they hash and compare by value."""

    mechanism: ClassVar[str]
    mechanisms: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Spec.mechanisms[cls.mechanism] = cls

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data; masks become dictionaries too."""
        out: dict[str, Any] = {"mechanism": self.mechanism}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
            out[field.name] = value.to_dict() if isinstance(value, Mask) else value
        return out


@dataclass(frozen=True)
class GQA(Spec):
    """Grouped-query attention (arXiv 2305.13245); MHA and MQA are its two ends.

    Args:
        num_kv_heads: key/value heads; has to divide the model's query heads. 1 is MQA, the number of query heads MHA.
        mask: which query sees which key.
    """

    mechanism: ClassVar[str] = "gqa"
    num_kv_heads: int | None = None
    mask: Mask | None = None

    def __post_init__(self) -> None:
        heads = self.num_kv_heads
        if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool) or heads < 1):
            raise ValueError(f"num_kv_heads must be a positive integer or None, got {heads!r}")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be one of attnzoo.masks or None, got {self.mask!r}")


@dataclass(frozen=True)
class Linear(Spec):
    """Linear attention (arXiv 2006.16236); with a window, softmax near and linear far (LoLCATs, 2410.10254).

    Args:
        num_kv_heads: key/value heads; has to divide the model's query heads.
        feature_map: "elu" (elu(x) + 1), "relu", "identity", "favor" (random features, 2009.14794) or "hedgehog"
            (learned, 2402.04347).
        num_features: how many random features "favor" draws; None: head_dim * ln(head_dim).
        normalize: whether outputs are divided by the sum of the weights; "favor" and a window need it.
        decay: what is left of each key/value head's state after a token, in (0, 1], or "retnet" (2307.08621); None:
            all of it. Not with a window.
        window: how many last keys a softmax sees; None: none.
    """

    mechanism: ClassVar[str] = "linear"
    feature_maps: ClassVar[tuple[str, ...]] = ("identity", "elu", "relu", "favor", "hedgehog")
    num_kv_heads: int | None = None
    feature_map: str = "elu"
    num_features: int | None = None
    normalize: bool = True
    decay: Sequence[float] | str | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "num_features", "window"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        if self.feature_map not in self.feature_maps:
            raise ValueError(f"feature_map must be one of {list(self.feature_maps)}, got {self.feature_map!r}")
        if self.num_features is not None and self.feature_map != "favor":
            raise ValueError(f"num_features must be None but for feature_map 'favor', got {self.num_features}")
        if self.decay is not None and self.decay != "retnet":
            values = () if isinstance(self.decay, str) else tuple(self.decay)
            if not values or not all(0 < value <= 1 for value in values):
                raise ValueError(f"decay must be 'retnet', None or numbers in (0, 1], got {self.decay!r}")
            object.__setattr__(self, "decay", values)  # hashable, also from YAML
        # Random features are right up to a factor that only the normaliser cancels, and that would weigh far and near.
        if self.feature_map == "favor" and not self.normalize:
            raise ValueError("normalize must be True for feature_map 'favor', got False")
        if self.window is not None and (not self.normalize or self.decay is not None or self.feature_map == "favor"):
            raise ValueError(
                "window needs normalize, no decay and a feature_map other than 'favor', "
                f"got {self.normalize}, {self.decay!r} and {self.feature_map!r}"
            )


@dataclass(frozen=True)
class MLA(Spec):
    """Multi-head latent attention (arXiv 2405.04434): a token's cache is one latent and one rope key for all heads.

    Args:
        kv_lora_rank: size of the latent, from which all heads' keys and values are projected up.
        qk_nope_head_dim: size of the part of a head's queries and keys that carries no position.
        qk_rope_head_dim: size of the part that is rotated, even; its key is shared by all heads.
        v_head_dim: size of a head's values.
        q_lora_rank: size of the queries' latent.
        mask: which query sees which key.
        rope_frequencies: for a model whose attention becomes this: which of its frequencies the rope part keeps, as
            rising indices, `qk_rope_head_dim / 2` of them. One that is there twice keeps more of itself.
    """

    mechanism: ClassVar[str] = "mla"
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_lora_rank: int | None = None
    mask: Mask | None = None
    rope_frequencies: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {size!r}")
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope_frequencies is not None:
            planes = tuple(self.rope_frequencies)
            if not all(isinstance(f, int) and not isinstance(f, bool) and f >= 0 for f in planes):
                raise ValueError(f"rope_frequencies must be indices from 0 on or None, got {list(planes)}")
            object.__setattr__(self, "rope_frequencies", planes)  # hashable, also from YAML
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be one of attnzoo.masks or None, got {self.mask!r}")


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The spec that `Spec.to_dict` described.

    Raises:
        ValueError: for an unknown mechanism or field, or a value that the spec refuses.
    """
    values = dict(data)
    name = values.pop("mechanism", None)
    cls = Spec.mechanisms.get(str(name))
    if cls is None:
        raise ValueError(f"mechanism must be one of {sorted(Spec.mechanisms)}, got {name!r}")
    known = {field.name for field in fields(cls)}
    if not set(values) <= known:
        raise ValueError(f"mechanism {name!r} takes {sorted(known)}, got {sorted(values)}")
    if isinstance(values.get("mask"), Mapping):
        values["mask"] = mask_from_dict(values["mask"])
    return cls(**values)
