"""From one attention mechanism to another, on the weights alone: no model class is imported here."""

from attnzoo.conversion.checkpoint import convert_checkpoint
from attnzoo.conversion.errors import ConversionError, Refusal, UnknownFamily
from attnzoo.conversion.merge import METHODS, merge_heads

__all__ = ["METHODS", "ConversionError", "Refusal", "UnknownFamily", "convert_checkpoint", "merge_heads"]
