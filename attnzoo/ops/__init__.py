"""Functional attention: tensors in, tensors out; no modules, no configs."""

from attnzoo.ops.decoding import decode
from attnzoo.ops.softmax import attention, explain

__all__ = ["attention", "decode", "explain"]
