"""Softmax attention: one API, several backends that all compute the same function."""

from attnzoo.ops.softmax.api import attention, explain

__all__ = ["attention", "explain"]
