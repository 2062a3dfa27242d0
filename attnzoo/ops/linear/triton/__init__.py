"""Linear attention in Triton kernels: chunks over states that live in registers, and a few tokens in one pass."""

from attnzoo.ops.linear.triton.op import run
from attnzoo.ops.linear.triton.reasons import reasons, step_reasons
from attnzoo.ops.linear.triton.step import step

__all__ = ["reasons", "run", "step", "step_reasons"]
