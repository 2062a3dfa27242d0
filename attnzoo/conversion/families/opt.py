"""OPT, and the same with fewer KV heads, which comes with code: no stock class that learns positions has them.

GPTBigCode is near with one KV head, but counts padding among the positions unless it is told them.
"""

from attnzoo.conversion.families.base import Config, Geometry, stock_geometry
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.families.separate import Separate


class OPT(Separate):
    """`q_proj k_proj v_proj out_proj`, with biases or without; learned positions."""

    base = "model."
    attention = "decoder.layers.{layer}.self_attn"

    def __init__(self, model_type: str, code: Code | None = None) -> None:
        super().__init__(model_type, output="out_proj", rope=None)
        self.code = code
        self.outside = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight")

    def geometry(self, config: Config) -> Geometry:
        # The stock class reads neither key, whatever a config.json may carry.
        ignored = ("head_dim",) if self.code else ("head_dim", "num_key_value_heads")
        return stock_geometry({key: value for key, value in config.items() if key not in ignored})

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        held = config if self.code else CODE.describe(config, "opt_gqa")
        return held | {"num_key_value_heads": num_kv_heads}


CODE = Code("modeling_opt_gqa.py", "OPTGQAConfig", {"OPTForCausalLM": ("AutoModelForCausalLM", "OPTGQAForCausalLM")})
FAMILIES = (OPT("opt"), OPT("opt_gqa", CODE))
