"""Where each model family keeps q, k, v and o. To add one: a Family in a file of its own, and its line here."""

from attnzoo.conversion.errors import ConversionError, Refusal, UnknownFamily
from attnzoo.conversion.families import (
    bloom,
    falcon,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gptj,
    opt,
    phi3,
    separate,
    stablelm,
    t5,
)
from attnzoo.conversion.families.base import Config, Family, Geometry, Projections

__all__ = [
    "Config",
    "ConversionError",
    "Family",
    "Geometry",
    "Projections",
    "Refusal",
    "UnknownFamily",
    "family_for",
    "known",
]

_MODULES = (separate, phi3, gpt2, gpt_bigcode, gpt_neox, gptj, falcon, bloom, opt, stablelm, t5)
_FAMILIES: dict[str, Family] = {family.model_type: family for module in _MODULES for family in module.FAMILIES}

_HINTS = {"gemma3": "; it is the model with images: its language model alone, saved as gemma3_text, converts"}


def known() -> list[str]:
    """The model types that have a family, sorted."""
    return sorted(_FAMILIES)


def family_for(model_type: str) -> Family:
    """The family of a config's `model_type`; raises UnknownFamily, which lists the known ones."""
    if model_type not in _FAMILIES:
        hint = _HINTS.get(model_type, "")
        raise UnknownFamily(f"model_type {model_type!r} is not among the known families {', '.join(known())}{hint}")
    return _FAMILIES[model_type]
