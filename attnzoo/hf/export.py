"""`attnzoo.hf.export`: a folder that loads without attnzoo, with the code of its attention layers in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnzoo.conversion import Refusal
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.hf.auto import AUTO, SwappedModel
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.layers import SwappedAttention
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.layers import RandomFeatures
from attnzoo.masks import Causal, Full

_TEMPLATE = Path(__file__).with_name("export_template.py")
_CODE = "modeling_attnzoo.py"
_PATTERNS = {"full", "causal", "sliding_window", "dilated", "global_tokens", "per_head", "and", "or"}


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a swapped model so that it loads where attnzoo is not installed.

    What a stock class holds is saved as that. Anything else gets its code beside it, one file in plain PyTorch, and
    loads by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` (or its head's Auto class). That
    code forms all attention weights and keeps keys and values even of linear attention: it is for use without attnzoo,
    not for speed. Where attnzoo is installed, `import attnzoo.hf` and then `from_pretrained(folder)` takes the layers
    of here.

    Args:
        model: a model that `attnzoo.swap` returned.
        folder: it appears whole or not at all.
        tokenizer: saved beside the model.
        overwrite: replace `folder` if it is a checkpoint.

    Returns:
        The folder's path.

    Raises:
        ValueError: for another kind of model, a pattern that the code has not (random blocks), or a folder that is
            there. Nothing is written then.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers model; got {type(model).__name__}")
    path = check_free(folder, overwrite=overwrite)
    held = isinstance(model, SwappedModel)
    layers = _layers(model) if held else {}
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with whole_folder(path, overwrite=overwrite, size=size) as out:
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        if held:
            names = list(layers)
            config = json.loads((out / "config.json").read_text(encoding="utf-8"))
            config["attnzoo"]["layers"] = [layers[name] for name in names]
            module = _CODE.removesuffix(".py")
            stock = type(model).__mro__[2]
            config["auto_map"] = {"AutoConfig": f"{module}.{type(model.config).__name__}"}
            for name in AUTO:
                if type(model.config).__mro__[1] in getattr(transformers, name)._model_mapping and _is(
                    name, stock, model
                ):
                    config["auto_map"][name] = f"{module}.{type(model).__name__}"
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (out / _CODE).write_text(_code(model, names[0]), encoding="utf-8")
    return path


def _is(auto: str, stock: type, model: PreTrainedModel) -> bool:
    return getattr(transformers, auto)._model_mapping[type(model.config).__mro__[1]] is stock


def _code(model: PreTrainedModel, first: str) -> str:
    """The template, written for Llama, in the names of this model's family."""
    config, stock = type(model.config).__mro__[1], type(model).__mro__[2]
    code = _TEMPLATE.read_text(encoding="utf-8").replace("# mypy: ignore-errors\n", "")
    for ours, theirs in (
        ("LlamaForCausalLM", stock.__name__),
        ("LlamaConfig", config.__name__),
        ('"attnzoo_llama"', f'"{model.config.model_type}"'),
        ('"model.layers.{}.self_attn"', json.dumps(first.replace("0", "{}", 1))),
    ):
        code = code.replace(ours, theirs)
    return code


def _layers(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What the template needs to know of each attention layer, by its path."""
    ours = (SwappedAttention, SwappedLinearAttention, SwappedLatentAttention)
    return {name: _about(name, layer) for name, layer in model.named_modules() if isinstance(layer, ours)}


def _about(name: str, layer: nn.Module) -> dict[str, Any]:
    linears = {
        part: [linear.in_features, linear.out_features, linear.bias is not None]
        for part, linear in layer.named_children()
        if isinstance(linear, nn.Linear)
    }
    about: dict[str, Any] = {
        "linears": linears,
        "causal": layer.is_causal,
        "scale": layer.scale,
        "softcap": layer.softcap,
        "dropout": layer.dropout,
        "num_heads": layer.num_heads,
        "norms": getattr(layer, "q_norm", None) is not None,
    }
    if isinstance(layer, SwappedLinearAttention):
        learned = layer.learned_map
        about |= {
            "mechanism": "linear",
            "mask": (Causal() if layer.causal else Full()).to_dict(),
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "feature_map": layer.feature_map,
            "num_features": learned.out_dim if isinstance(learned, RandomFeatures) else None,
            "normalize": layer.normalize,
            "decay": None if layer.decay is None else list(layer.decay),
            "window": layer.window,
        }
        return about
    assert isinstance(layer, SwappedAttention | SwappedLatentAttention) and layer.mask is not None
    about["mask"] = layer.mask.to_dict()
    unknown = _patterns(about["mask"]) - _PATTERNS
    if unknown:
        raise Refusal(
            f"the exported code has no pattern {', '.join(sorted(unknown))}, which mask={layer.mask} of {name} has"
        )
    if isinstance(layer, SwappedLatentAttention):
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "pairs")
        return about | {"mechanism": "mla"} | {size: getattr(layer, size) for size in sizes}
    return about | {"mechanism": "gqa", "num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}


def _patterns(mask: dict[str, Any]) -> set[str]:
    """The names of all patterns in a mask's dictionary."""
    found = {mask["pattern"]}
    for value in mask.values():
        for part in value if isinstance(value, list) else [value]:
            found |= _patterns(part) if isinstance(part, dict) else set()
    return found
