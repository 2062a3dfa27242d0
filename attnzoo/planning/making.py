"""The plan: one row a mechanism, for one model on one machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from attnzoo.planning.cost import Cost, Gpu, cost_of
from attnzoo.planning.mechanisms import Candidate, mechanisms, with_spec
from attnzoo.planning.model import Model
from attnzoo.planning.reading import read_model
from attnzoo.specs import Spec


@dataclass(frozen=True)
class Row:
    """One mechanism: its cost, or why the model cannot have it.

    Attributes:
        name: as the table shows it.
        spec: what names the mechanism; None: the model's own.
        cost: None where the model cannot have it; `refusal` says why then.
    """

    name: str
    spec: Spec | None
    cost: Cost | None
    refusal: str | None = None


@dataclass(frozen=True)
class Plan:
    """What was asked, and a row a mechanism."""

    model: Model
    gpu: Gpu
    context: int
    batch: int
    dtype: str
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, for JSON."""
        rows = [
            {"name": row.name, "spec": None if row.spec is None else row.spec.to_dict()}
            | ({"refusal": row.refusal} if row.cost is None else asdict(row.cost))
            for row in self.rows
        ]
        asked = {"context": self.context, "batch": self.batch, "dtype": self.dtype, "gpu": asdict(self.gpu)}
        model = {"model_type": self.model.model_type, "num_layers": len(self.model.layers), "dim": self.model.dim}
        model |= {"vocab_size": self.model.vocab_size, "max_positions": self.model.max_positions}
        return {"model": model, **asked, "notes": list(self.model.notes), "rows": rows}


def plan(
    config: Mapping[str, Any],
    *,
    gpu: Gpu | None = None,
    context: int = 8192,
    batch: int = 1,
    dtype: str = "bfloat16",
    window: int = 4096,
    global_tokens: int = 64,
    also: Sequence[Spec] = (),
) -> Plan:
    """What the model of a config.json dictionary costs with each mechanism.

    Args:
        config: of a causal language model, with transformers' names.
        gpu: None: an H100 with 80 GB.
        context: tokens of a sequence.
        batch: sequences at once in decoding.
        dtype: of weights and caches, one of `cost.SIZES`.
        window: keys that a query sees in the window and the sparse row.
        global_tokens: first tokens that all see in the sparse row.
        also: more mechanisms, a row each.

    Raises:
        ValueError: for a config without what a plan needs (naming the key), and for arguments out of range. A
            mechanism that the model cannot have is no error: its row says why.
    """
    gpu = Gpu() if gpu is None else gpu
    model = read_model(config)
    asked: list[Candidate] = [
        *mechanisms(model, window=window, global_tokens=global_tokens),
        *((_name(spec), spec, partial(with_spec, model, spec)) for spec in also),
    ]
    cost_of(model, gpu, context=context, batch=batch, dtype=dtype)  # what is wrong with the arguments is no refusal
    rows = tuple(_row(name, spec, make, gpu, context, batch, dtype) for name, spec, make in asked)
    return Plan(model, gpu, context, batch, dtype, rows)


def _row(
    name: str, spec: Spec | None, make: Callable[[], Model], gpu: Gpu, context: int, batch: int, dtype: str
) -> Row:
    try:
        changed = make()
    except ValueError as error:
        return Row(name, spec, None, str(error))
    return Row(name, spec, cost_of(changed, gpu, context=context, batch=batch, dtype=dtype))


def _name(spec: Spec) -> str:
    """`gqa num_kv_heads=3`: the mechanism and what it sets."""
    plain = type(spec)().to_dict()
    given = [f"{key}={value}" for key, value in spec.to_dict().items() if value != plain[key] and key != "mask"]
    mask = getattr(spec, "mask", None)
    return " ".join([spec.mechanism, *given, *([] if mask is None else [str(mask)])])
