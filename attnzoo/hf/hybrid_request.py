"""What a conversion of some layers is asked to do, read against the model that it is asked of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from attnzoo.conversion import ConversionError
from attnzoo.conversion.families import Family, Geometry, family_for
from attnzoo.conversion.hybrid import KVBudget, Layers, asked_layers
from attnzoo.hf.plan import mask_of, one_a_layer
from attnzoo.planning.attention import Softmax
from attnzoo.planning.recurrent import Recurrent
from attnzoo.specs import GQA, Linear, Spec


@dataclass(frozen=True)
class Request:
    """A conversion of some layers.

    Attributes:
        family, geometry: of the model.
        specs: what each layer becomes if it is changed.
        asked: the layers to change, or None where the damage decides.
        choice: by what it decides.
    """

    family: Family
    geometry: Geometry
    specs: list[Spec]
    asked: list[int] | None
    choice: int | KVBudget | None

    @property
    def count(self) -> int:
        return self.geometry.num_layers

    @property
    def name(self) -> str:
        """What reports call it."""
        linear = any(isinstance(spec, Linear) for spec in self.specs)
        return "linear" if linear else "window"

    def chosen(self, layers: Sequence[int]) -> list[Spec]:
        """One spec a layer, where only `layers` are changed."""
        return [spec if number in layers else GQA() for number, spec in enumerate(self.specs)]


def read_request(model: PreTrainedModel, spec: Spec | Sequence[Spec], layers: Layers | None) -> Request:
    """The request; raises ConversionError for one that does not fit the model or itself."""
    config = model.config.to_dict()
    family = family_for(str(config["model_type"]))
    geometry = family.geometry(config)
    specs = one_a_layer(spec, geometry.num_layers)
    if layers is not None and not isinstance(spec, Spec):
        raise ConversionError("layers says where one spec goes; a list of specs says that by itself")
    for one in specs:
        if not isinstance(one, GQA | Linear):
            raise ConversionError(f"spec must be a GQA with a mask or a Linear to go into some layers; got {one!r}")
        if one.num_kv_heads not in (None, geometry.num_kv_heads):
            raise ConversionError(
                f"num_kv_heads must be None, or the model's {geometry.num_kv_heads}, beside masks and linear layers; "
                f"convert the heads first; got {one.num_kv_heads}"
            )
        if layers is not None and one == GQA(one.num_kv_heads):
            raise ConversionError(f"spec changes nothing in the layers that it is for: {one!r}")
    asked = asked_layers(layers, geometry.num_layers)
    if not isinstance(spec, Spec):
        asked = [number for number, one in enumerate(specs) if one != GQA(one.num_kv_heads)]  # type: ignore[attr-defined]
    choice = layers if asked is None else None
    return Request(family, geometry, specs, asked, choice)  # type: ignore[arg-type]


def cache_bytes(
    request: Request, before: Sequence[nn.Module], after: Sequence[nn.Module], model: PreTrainedModel, length: int
) -> tuple[list[int], list[int]]:
    """What each layer keeps of `length` tokens, as it is and changed: of keys and values, those that a query sees.

    Args:
        request: the request.
        before, after: the layers' attention modules.
        model: of which `before` is; caches are of its dtype.
        length: tokens.
    """
    g, size = request.geometry, model.dtype.itemsize
    config = model.config.to_dict()
    softmax = Softmax(g.num_heads, g.num_kv_heads, g.head_dim, g.head_dim)
    old, new = [], []
    for number, (layer, other) in enumerate(zip(before, after, strict=True)):
        spec = request.specs[number]
        old.append(replace(softmax, mask=mask_of(layer, number, config)).decode_bytes(length, size))
        if isinstance(spec, Linear):
            state = Recurrent(softmax, spec.feature_map, spec.num_features, spec.normalize, spec.window)
            new.append(state.cache_bytes(length, size))
        else:
            new.append(replace(softmax, mask=mask_of(other, number, config)).decode_bytes(length, size))
    return old, new
