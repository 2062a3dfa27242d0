"""Linear attention: features of keys and values summed in a state of constant size."""

from attnzoo.ops.linear.api import explain_linear, linear_attention, linear_step
from attnzoo.ops.linear.common import State
from attnzoo.ops.linear.decoding import linear_decode, linear_decode_in_place
from attnzoo.ops.linear.hybrid import hybrid_attention
from attnzoo.ops.linear.stepping import hybrid_step

__all__ = [
    "State",
    "explain_linear",
    "hybrid_attention",
    "hybrid_step",
    "linear_attention",
    "linear_decode",
    "linear_decode_in_place",
    "linear_step",
]
