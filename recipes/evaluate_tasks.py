"""Benchmarks of lm-evaluation-harness, where it is installed: `pip install "attnzoo[eval]"`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HarnessMissing(ValueError):
    """Tasks were asked for, and lm-evaluation-harness is not installed."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Results by task and metric, from the harness's own HFLM around the model, on the device where that lies.

    Args:
        model, tokenizer: of transformers.
        tasks: names of the harness's tasks; none gives no results and needs no harness.
        task_path: a folder with tasks of one's own, as the harness's YAML files.
        num_fewshot: examples before each question; None is the task's own number.
        limit: questions of each task; None takes all.
        batch_size: questions at once.

    Raises:
        HarnessMissing: when there are tasks and no harness.
        ValueError: for a task that the harness does not know.
    """
    if not tasks:
        return {}
    require_harness(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        where = f" and in {task_path}" if task_path else ""
        raise ValueError(f"lm-evaluation-harness{where} has no task {', '.join(unknown)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {task: _numbers(result) for task, result in found["results"].items()}


def require_harness(tasks: Sequence[str]) -> None:
    """Raises HarnessMissing where tasks are asked for and the harness is not installed, before a long run."""
    if tasks and find_spec("lm_eval") is None:
        raise HarnessMissing(
            f"tasks {', '.join(tasks)} are benchmarks of lm-evaluation-harness, which is not installed: "
            'pip install "attnzoo[eval]", or leave tasks empty'
        )


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """`acc,none` as `acc`; a filter's name stays. Standard errors and the task's alias go."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and "_stderr" not in key and "," in key
    }
