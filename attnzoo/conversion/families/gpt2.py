"""GPT-2: `c_attn` is a Conv1D `[in, out]` with columns q | k | v.

One KV head is GPTBigCode's multi-query form; other numbers come with code, as no stock class that learns positions has
them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Move, Projections, shaped, whole
from attnzoo.conversion.families.code import Code

# Both classes have these heads, computed alike.
_ARCHITECTURES = {
    "GPT2Model": "GPTBigCodeModel",
    "GPT2LMHeadModel": "GPTBigCodeForCausalLM",
    "GPT2ForSequenceClassification": "GPTBigCodeForSequenceClassification",
    "GPT2ForTokenClassification": "GPTBigCodeForTokenClassification",
}


def gpt2_geometry(config: Config, kv_heads: int | None = None) -> Geometry:
    """The geometry of a config in GPT-2's words (n_head, n_embd, n_layer) or in the usual ones."""
    heads, dim = whole(config, "n_head", "num_attention_heads"), whole(config, "n_embd", "hidden_size")
    if dim % heads:
        raise ConversionError(f"config.json has n_embd {dim}, not a multiple of its n_head {heads}")
    return Geometry(whole(config, "n_layer", "num_hidden_layers"), heads, kv_heads or heads, dim // heads, dim)


class GPT2(Family):
    """`c_attn` and `c_proj`, stored `[in, out]`; always biases."""

    base = "transformer."
    attention = "h.{layer}.attn"
    outside = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    required = ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")
    buffers = ("bias", "masked_bias")
    rope = None

    def __init__(self, model_type: str, code: Code | None = None) -> None:
        self.model_type, self.code = model_type, code

    def geometry(self, config: Config) -> Geometry:
        return gpt2_geometry(config, whole(config, "num_key_value_heads") if self.code else None)

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        g = geometry
        heads = (g.num_heads, g.num_kv_heads, g.num_kv_heads)
        rows, d, dim = sum(heads), g.head_dim, g.dim
        weight = shaped(tensors, "c_attn.weight", dim, rows, d, stored=(dim, rows * d))
        biases = shaped(tensors, "c_attn.bias", rows, d).split(heads)
        o = shaped(tensors, "c_proj.weight", g.num_heads, d, dim)
        o_bias = shaped(tensors, "c_proj.bias", dim)
        q, k, v = weight.permute(1, 2, 0).split(heads)
        return Projections(q, k, v, o.permute(2, 0, 1), biases[0], biases[1], biases[2], o_bias)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        return {
            "c_attn.weight": torch.cat((p.q, p.k, p.v)).flatten(0, 1).t().contiguous(),
            "c_attn.bias": torch.cat((p.q_bias, p.k_bias, p.v_bias)).flatten(),  # type: ignore[arg-type]
            "c_proj.weight": p.o.flatten(1, 2).t().contiguous(),
            "c_proj.bias": p.o_bias,  # type: ignore[dict-item]
        }

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        if self.code:
            return config | {"num_key_value_heads": num_kv_heads}
        if config.get("add_cross_attention"):
            raise Refusal(
                "neither GPTBigCode nor the code that is written beside the weights has add_cross_attention, "
                "which this GPT-2 has"
            )
        if num_kv_heads > 1 or config.get("scale_attn_by_inverse_layer_idx"):
            return CODE.describe(config, "gpt2_gqa") | {"num_key_value_heads": num_kv_heads}
        for key in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
            config.pop(key, None)  # off, and unknown to GPTBigCode
        for name in config.get("architectures") or ():
            if name not in _ARCHITECTURES:
                raise Refusal(f"GPTBigCode has no counterpart of {name}; it has {', '.join(_ARCHITECTURES.values())}")
        # It orders the same sums in another way; GPTBigCode has its own switches for that, fp32 by default.
        config.pop("reorder_and_upcast_attn", None)
        # The defaults differ, so the one of GPT-2 is written out.
        activation = config.get("activation_function") or "gelu_new"
        config |= {"model_type": "gpt_bigcode", "multi_query": True, "activation_function": activation}
        if config.get("architectures"):
            config["architectures"] = [_ARCHITECTURES[name] for name in config["architectures"]]
        return config

    def moves(self, names: Iterable[str], holder: Family) -> dict[str, Move]:
        if holder is self or holder.code:
            return super().moves(names, holder)
        # GPTBigCode stores no causal mask with its fill value, and has a Linear [out, in] for each Conv1D [in, out].
        turned = ("mlp.c_fc.weight", "mlp.c_proj.weight")
        return {
            name: Move((name,), _turned) if name.endswith(turned) else Move((name,))
            for name in names
            if not self.locate(name)
        }


def _turned(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


CODE = Code(
    "modeling_gpt2_gqa.py", "GPT2GQAConfig", {"GPT2LMHeadModel": ("AutoModelForCausalLM", "GPT2GQALMHeadModel")}
)
FAMILIES = (GPT2("gpt2"), GPT2("gpt2_gqa", CODE))
