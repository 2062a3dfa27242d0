"""GPT-J, whose class has no fewer KV heads: Phi holds them, with the dimensions that RoPE turns in its order."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.families.base import Config, Family, Geometry, Move, Projections, whole
from attnzoo.conversion.families.gpt2 import gpt2_geometry
from attnzoo.conversion.families.rehouse import common, renamed, with_biases
from attnzoo.conversion.families.separate import Separate
from attnzoo.conversion.rotary import Rotary

_PHI = {
    "wte.": "embed_tokens.",
    "ln_f.": "final_layernorm.",
    "ln_1.": "input_layernorm.",
    "mlp.fc_in.": "mlp.fc1.",
    "mlp.fc_out.": "mlp.fc2.",
}


class GPTJ(Separate):
    """`q_proj k_proj v_proj out_proj` without biases; RoPE turns `rotary_dim` dimensions, in pairs of neighbours."""

    base = "transformer."
    attention = "h.{layer}.attn"
    buffers = ("bias", "masked_bias", "embed_positions")

    def __init__(self) -> None:
        super().__init__("gptj", output="out_proj", rope="interleaved")
        self.outside = ("wte.weight", "ln_f.weight", "ln_f.bias")
        self.optional = ()

    def geometry(self, config: Config) -> Geometry:
        return gpt2_geometry(config)

    def rotary(self, config: Config, layer: int) -> Rotary:
        return Rotary(whole(config, "rotary_dim", default=64), "interleaved")

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        g, rotated = self.geometry(config), self.rotary(config, 0).size
        part = rotated / g.head_dim
        if rotated > g.head_dim or rotated % 2:
            raise ConversionError(f"config.json needs an even rotary_dim of at most {g.head_dim}, got {rotated}")
        if int(g.head_dim * part) != rotated:  # the class rounds down
            part = (rotated + 0.5) / g.head_dim
        found: Config = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}
        new = {"bos_token_id": 50256, "eos_token_id": 50256} | common(config, "GPTJ", "Phi")
        return new | {
            "model_type": "phi",
            "hidden_size": g.dim,
            "num_hidden_layers": g.num_layers,
            "num_attention_heads": g.num_heads,
            "num_key_value_heads": num_kv_heads,
            "intermediate_size": whole(config, "n_inner", default=4 * g.dim),
            "hidden_act": config.get("activation_function") or "gelu_new",
            "max_position_embeddings": whole(config, "n_positions", "max_position_embeddings", default=2048),
            "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "attention_dropout": config.get("attn_pdrop") or 0.0,
            "resid_pdrop": config.get("resid_pdrop") or 0.0,
            "embd_pdrop": config.get("embd_pdrop") or 0.0,
            "rope_theta": found["rope_theta"],  # where older transformers read it, and the next
            "partial_rotary_factor": part,
            "rope_parameters": found,
        }

    def moves(self, names: Iterable[str], holder: Family) -> dict[str, Move]:
        return super().moves(names, holder) if holder is self else renamed(names, self, holder, _PHI)

    def house(
        self, projections: Projections, beside: Mapping[str, Tensor], holder: Family, config: Config
    ) -> dict[str, Tensor]:
        if holder is self:
            return super().house(projections, beside, holder, config)
        p, geometry = with_biases(projections), holder.geometry(config)
        rotary = Rotary(holder.rotary(config, 0).size, "interleaved")
        # Phi rotates dimension f with f + half of them, where neighbours are rotated here.
        order = torch.cat((*rotary.planes(), rotary.free(geometry.head_dim))).to(p.q.device)
        return holder.join(replace(p, q=p.q[:, order], k=p.k[:, order]), geometry)


FAMILIES = (GPTJ(),)
