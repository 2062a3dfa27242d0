"""Specs name an attention mechanism, without any weights: what swap, convert, export and the recipes' configs speak.

A field that is None stays as the model has it. A spec round-trips through `to_dict` and `spec_from_dict`, and so
through YAML and config.json. A list of specs is one per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
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
