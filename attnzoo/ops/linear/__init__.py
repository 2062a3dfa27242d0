"""Linear attention: features of keys and values summed in a state of constant size."""

from attnzoo.ops.linear.api import explain_linear, linear_attention, linear_step
from attnzoo.ops.linear.common import State
from attnzoo.ops.linear.decoding import linear_decode
from attnzoo.ops.linear.hybrid import hybrid_attention

__all__ = ["State", "explain_linear", "hybrid_attention", "linear_attention", "linear_decode", "linear_step"]
