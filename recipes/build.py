"""What trains in a run, made from its config: the student, and the objectives of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from recipes.embeddings import untie
from recipes.heads import check_head
from recipes.models import load_model
from recipes.objectives import Layers, Objective
from recipes.objectives.layers import LayerErrors
from recipes.stages import Stage
from recipes.teacher import Teacher, load_teacher


def build_student(config: DictConfig, start: Path) -> PreTrainedModel:
    """The model that trains, on the CPU. ValueError for one that the losses do not know."""
    model = load_model({**config.model, "path": str(start)})
    if config.untie_embeddings:
        untie(model)
    check_head(model)
    return model


def build_objectives(
    config: DictConfig, student: PreTrainedModel, stages: Sequence[Stage], *, source: Path, first_step: int
) -> list[Objective | None]:
    """An objective for each stage, None for those that are over; the teacher is loaded once, if it is needed at all.

    Args:
        config: of the run.
        student: as it starts.
        stages: of the run.
        source: the folder of the original model.
        first_step: where the run goes on.
    """
    ahead = [stage for stage in stages if stage.end > first_step]
    teacher = layers = None
    if any(stage.needs_teacher for stage in ahead):
        teacher = build_teacher(config, source)
        _check_vocabulary(student, teacher)
    if any(isinstance(term, Layers) for stage in ahead for term in stage.terms):
        assert teacher is not None
        layers = LayerErrors(student, teacher)
    return [
        Objective(
            stage.terms,
            teacher=teacher if stage.needs_teacher else None,
            layers=layers if any(isinstance(term, Layers) for term in stage.terms) else None,
        )
        if stage in ahead
        else None
        for stage in stages
    ]


def build_teacher(config: DictConfig, source: Path) -> Teacher:
    """The teacher of a run, on the CPU."""
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return load_teacher(config.teacher, {**config.model, "path": str(source)}, on_gpu=on_gpu)


def _check_vocabulary(student: PreTrainedModel, teacher: Teacher) -> None:
    theirs, own = (model.get_output_embeddings().weight.shape[0] for model in (teacher.model, student))
    if theirs != own:
        raise ValueError(f"teacher has {theirs} tokens in its vocabulary, the student {own}; they must have the same")
