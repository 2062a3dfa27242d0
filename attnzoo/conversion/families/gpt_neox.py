"""GPT-NeoX, whose class has no fewer KV heads: with parallel residuals Phi holds them, without Starcoder2.

Phi has one norm for attention and MLP, so the scales and shifts of both go into the linear layers behind them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Move, Projections, stock_geometry, whole
from attnzoo.conversion.families.fused import Fused
from attnzoo.conversion.families.rehouse import common, renamed, rope, scaled, shifted, with_biases

_PHI = {
    "embed_in.": "embed_tokens.",
    "final_layer_norm.": "final_layernorm.",
    "mlp.dense_h_to_4h.": "mlp.fc1.",
    "mlp.dense_4h_to_h.": "mlp.fc2.",
    "embed_out.": "lm_head.",
}
_STARCODER2 = {
    "embed_in.": "embed_tokens.",
    "final_layer_norm.": "norm.",
    "mlp.dense_h_to_4h.": "mlp.c_fc.",
    "mlp.dense_4h_to_h.": "mlp.c_proj.",
    "embed_out.": "lm_head.",
}


class GPTNeoX(Fused):
    """`query_key_value` head by head; both layers with biases or both without."""

    model_type = "gpt_neox"
    base = "gpt_neox."
    attention = "layers.{layer}.attention"
    outside = ("embed_in.weight", "final_layer_norm.weight", "final_layer_norm.bias")
    rotated = 0.25

    def geometry(self, config: Config) -> Geometry:
        # The class reads neither key, whatever a config.json may carry.
        ignored = ("num_key_value_heads", "head_dim")
        return stock_geometry({key: value for key, value in config.items() if key not in ignored})

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        g = self.geometry(config)
        parallel = config.get("use_parallel_residual", True)
        new = {"bos_token_id": 0, "eos_token_id": 2} | common(config, "GPTNeoX", "Phi" if parallel else "Starcoder2")
        new |= rope(config, self.rotated) | {
            "model_type": "phi" if parallel else "starcoder2",
            "hidden_size": g.dim,
            "num_hidden_layers": g.num_layers,
            "num_attention_heads": g.num_heads,
            "num_key_value_heads": num_kv_heads,
            "intermediate_size": whole(config, "intermediate_size"),
            "hidden_act": config.get("hidden_act") or "gelu",
            "max_position_embeddings": whole(config, "max_position_embeddings", default=2048),
            "attention_dropout": config.get("attention_dropout") or 0.0,
        }
        rotated = int(g.head_dim * new["partial_rotary_factor"])
        if rotated % 2:
            raise Refusal(f"Phi and Starcoder2 rotate pairs, and rotary_pct says {rotated} of {g.head_dim} dimensions")
        dropout, epsilon = config.get("hidden_dropout") or 0.0, config.get("layer_norm_eps", 1e-5)
        if parallel:
            return new | {"layer_norm_eps": epsilon, "resid_pdrop": dropout, "embd_pdrop": dropout}
        if rotated != g.head_dim:
            raise Refusal(
                f"no stock class holds GPT-NeoX with use_parallel_residual=false, rotary_pct under 1 and num_kv_heads="
                f"{num_kv_heads}: Phi has parallel residuals only, Starcoder2 rotates whole heads; attnzoo.swap holds "
                "it in memory"
            )
        dropouts = {"residual_dropout": dropout, "embedding_dropout": dropout}
        return new | dropouts | {"norm_epsilon": epsilon, "use_bias": True, "sliding_window": None}

    def moves(self, names: Iterable[str], holder: Family) -> dict[str, Move]:
        if holder is self:
            return super().moves(names, holder)
        if holder.model_type == "starcoder2":
            return renamed(names, self, holder, _STARCODER2)
        moves = {}
        for name, move in renamed(names, self, holder, _PHI).items():
            if name.endswith("input_layernorm.weight"):
                moves[name] = replace(move, make=torch.ones_like)
            elif name.endswith("input_layernorm.bias"):
                moves[name] = replace(move, make=torch.zeros_like)
            elif ".mlp.fc1." in name:
                mlp, _, kind = move.sources[0].partition("dense_h_to_4h.")
                norm = mlp.removesuffix("mlp.") + "post_attention_layernorm."
                if kind == "weight":
                    moves[name] = Move((*move.sources, norm + "weight"), scaled)
                else:
                    moves[name] = Move((*move.sources, f"{mlp}dense_h_to_4h.weight", norm + "bias"), shifted)
            elif "post_attention_layernorm." not in name:
                moves[name] = move
        # Tied to the embeddings the output is not stored; a model with another head has neither.
        other = {"score.weight", "classifier.weight"} & moves.keys()
        tied = None if other else moves.get(holder.base + "embed_tokens.weight")
        if head := moves.get("lm_head.weight", tied):
            moves["lm_head.bias"] = replace(head, make=_no_bias)
        return moves

    def beside(self, number: int, holder: Family) -> dict[str, str]:
        if holder.model_type != "phi":
            return {}
        return {f"norm.{kind}": f"layers.{number}.input_layernorm.{kind}" for kind in ("weight", "bias")}

    def house(
        self, projections: Projections, beside: Mapping[str, Tensor], holder: Family, config: Config
    ) -> dict[str, Tensor]:
        if holder is self:
            return super().house(projections, beside, holder, config)
        p = with_biases(projections)
        if beside:
            scale, shift = beside["norm.weight"], beside["norm.bias"]
            folded = {part: scaled(getattr(p, part), scale) for part in "qkv"}
            folded |= {f"{part}_bias": shifted(getattr(p, f"{part}_bias"), getattr(p, part), shift) for part in "qkv"}
            p = replace(p, **folded)
        return holder.join(p, holder.geometry(config))


def _no_bias(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight[:, 0])


FAMILIES = (GPTNeoX(),)
