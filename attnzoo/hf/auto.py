"""Classes of swapped models that no stock class holds, for `from_pretrained`: the family's, with another model type.

Each is made when it is first needed, as a subclass of the stock class that builds the stock model and swaps its layers
as `config.attnzoo` says. Their model types are "attnzoo_llama" and so on: stock transformers refuses them by name
instead of loading something else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from attnzoo.hf.recurrent_cache import recurrent_layer
from attnzoo.specs import spec_from_dict

_PREFIX = "attnzoo_"
AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
_CONFIGS = (
    "BertConfig",
    "ElectraConfig",
    "GPT2Config",
    "GPTNeoXConfig",
    "Gemma2Config",
    "Gemma3TextConfig",
    "GemmaConfig",
    "GraniteConfig",
    "LlamaConfig",
    "MinistralConfig",
    "MistralConfig",
    "MixtralConfig",
    "NemotronConfig",
    "Phi3Config",
    "PhiConfig",
    "Qwen2Config",
    "Qwen2MoeConfig",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "RobertaConfig",
    "StableLmConfig",
    "Starcoder2Config",
    "XLMRobertaConfig",
)


class SwappedModel:
    """What a swapped model's class adds to the stock one; it stands before it."""

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        from attnzoo.hf.swap import rebuild  # which needs this module

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        rebuild(self, [spec_from_dict(spec) for spec in config.attnzoo["spec"]])  # type: ignore[arg-type]

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """A cache whose layers are those of the model from the start, which assisted decoding has to know."""
        result = super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]
        everything = [*args, *kwargs.values()]
        for given in everything:
            cache = given.get("past_key_values") if isinstance(given, dict) else None
            if isinstance(cache, Cache):
                for module in self.modules():  # type: ignore[attr-defined]
                    if getattr(module, "keeps_state", False):
                        recurrent_layer(cache, module.layer_idx)
                if any(getattr(part, "is_assistant", False) for part in everything):
                    cache.activate_past_recording()
        return result


def stock_type(model_type: str) -> str:
    """The family's own model type."""
    return model_type.removeprefix(_PREFIX)


def hold(model: PreTrainedModel) -> None:
    """Make a model and its config of the classes that can hold a swapped one."""
    if not isinstance(model, SwappedModel):
        model.config.__class__ = _config_class(type(model.config))  # type: ignore[arg-type]
        model.__class__ = _model_class(type(model))  # type: ignore[arg-type]


def release(model: PreTrainedModel) -> None:
    """Make a model and its config of the stock classes again."""
    if isinstance(model, SwappedModel):
        model.config.__class__ = type(model.config).__mro__[1]
        model.__class__ = type(model).__mro__[2]


def register() -> None:
    """Make `AutoConfig` know the configs, and they the models."""
    for name in _CONFIGS:
        config = _config_class(getattr(transformers, name))
        AutoConfig.register(config.model_type, config, exist_ok=True)


@lru_cache
def _config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    if stock.model_type.startswith(_PREFIX):
        return stock
    members = {"model_type": _PREFIX + stock.model_type, "from_dict": classmethod(_from_dict), "__module__": __name__}
    new = type(f"Attnzoo{stock.__name__}", (stock,), members)
    globals()[new.__name__] = new  # where pickle looks
    return new


@lru_cache
def _model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    members = {"config_class": _config_class(stock.config_class), "__module__": __name__}
    new = type(f"Attnzoo{stock.__name__}", (SwappedModel, stock), members)
    globals()[new.__name__] = new
    return new


def _from_dict(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """As the stock class's; the models of its class are made known first, which imports them."""
    stock = cls.__mro__[1]
    for name in AUTO:
        auto = getattr(transformers, name)
        if stock in auto._model_mapping:
            auto.register(cls, _model_class(auto._model_mapping[stock]), exist_ok=True)
    return super(cls, cls).from_dict(config_dict, **kwargs)  # type: ignore[misc]
