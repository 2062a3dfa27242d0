"""Which stock config holds a mask for every layer: one for all, or a window in some layers and none in the others."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families import Config, Family, family_for
from attnzoo.masks import Causal, Mask, SlidingWindow

# Ministral is Llama without biases (and Mistral) with a list of its layers' kinds.
_IN_MINISTRAL = {"llama": ("attention_bias", "mlp_bias"), "mistral": ()}
_UNKNOWN_TO_MINISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp")


def hold_masks(family: Family, config: Config, masks: Sequence[Mask]) -> Config:
    """The family's config whose layers have these masks; raises Refusal where it holds none."""
    windows = {mask for mask in masks if isinstance(mask, SlidingWindow)}
    if len(set(masks)) == 1 or len(windows) != 1 or set(masks) - windows != {Causal()}:
        if len(set(masks)) > 1:
            raise Refusal("its layers differ in their masks")
        return family.with_mask(config, masks[0])
    held = family.with_mask(config, next(iter(windows)))
    if "layer_types" not in held or not held["layer_types"]:
        raise Refusal(f"its layers differ in their masks, and {family.model_type} has one for all")
    kinds = ["sliding_attention" if mask in windows else "full_attention" for mask in masks]
    return held | {"layer_types": kinds}


def windowed_config(config: Config, masks: Sequence[Mask]) -> Config:
    """A stock config whose layers have these masks and whose class computes and stores everything else as `config`'s.

    It is of the same class, or Ministral's for Llama and Mistral, which have one mask for all layers.

    Args:
        config: a config.json dictionary.
        masks: which query sees which key, one a layer.

    Raises:
        Refusal: where no stock class holds them.
    """
    model_type = str(config.get("model_type"))
    family = family_for(model_type)
    if len(masks) != family.geometry(config).num_layers:
        raise ValueError(f"masks lists {len(masks)} layers, the model has {family.geometry(config).num_layers}")
    try:
        return hold_masks(family, config, masks)
    except Refusal:
        if model_type not in _IN_MINISTRAL or any(config.get(key) for key in _IN_MINISTRAL[model_type]):
            raise
    moved = {key: value for key, value in config.items() if key not in _UNKNOWN_TO_MINISTRAL}
    # Ministral's attention takes no null for head_dim.
    moved |= {"model_type": "ministral", "sliding_window": None, "head_dim": family.geometry(config).head_dim}
    if config.get("architectures"):
        moved["architectures"] = [
            name.replace(model_type.capitalize(), "Ministral") for name in config["architectures"]
        ]
    return hold_masks(family_for("ministral"), moved, masks)
