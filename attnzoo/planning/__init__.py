"""What a model would cost with each mechanism, worked out from its config.json alone."""

from attnzoo.planning.cost import Cost, Gpu, cost_of
from attnzoo.planning.making import Plan, Row, plan
from attnzoo.planning.mechanisms import with_int8, with_spec
from attnzoo.planning.model import Model
from attnzoo.planning.reading import read_model
from attnzoo.planning.table import markdown_table, text_table
from attnzoo.planning.traits import known_types

__all__ = [
    "Cost",
    "Gpu",
    "Model",
    "Plan",
    "Row",
    "cost_of",
    "known_types",
    "markdown_table",
    "plan",
    "read_model",
    "text_table",
    "with_int8",
    "with_spec",
]
