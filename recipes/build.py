"""What trains in a run, made from its config: the student, and the objectives of its stages."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from filelock import FileLock
from omegaconf import DictConfig
from transformers import PreTrainedModel

from recipes import parallel
from recipes.compiling import compile_model
from recipes.data import TextDataModule
from recipes.embeddings import untie
from recipes.heads import check_head
from recipes.models import load_model
from recipes.objectives import Layers, Objective
from recipes.objectives.layers import LayerErrors
from recipes.stages import Stage
from recipes.teacher import Teacher
from recipes.teacher_store import TeacherStore, fill, keys_of, require_space
from recipes.windows import Windows

log = logging.getLogger(__name__)


def build_student(config: DictConfig, start: Path, stages: Sequence[Stage]) -> PreTrainedModel:
    """The model that trains, on the CPU, or without weights where the strategy brings them from the main process.

    ValueError for one that the losses do not know.
    """
    weights = loads_weights(config, stages)
    model = load_model({**config.model, "path": str(start)}, weights=weights)
    if config.untie_embeddings:
        untie(model)
    if weights:
        check_head(model)
    return model


def loads_weights(config: DictConfig, stages: Sequence[Stage]) -> bool:
    """Whether this process reads models from the disk: not beside FSDP's main one, unless layers have to be compared
    before the processes can speak to one another."""
    compares = any(isinstance(term, Layers) for stage in stages for term in stage.terms)
    return config.trainer.strategy != "fsdp" or parallel.is_main_process() or compares


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
        teacher = build_teacher(config, source, weights=loads_weights(config, stages))
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


def build_teacher(config: DictConfig, source: Path, *, weights: bool = True) -> Teacher:
    """The teacher of a run, on the CPU, or without weights as a student may be."""
    given = config.teacher
    chosen = {
        "path": given.path or str(source),
        "dtype": teacher_dtype(config),
        "attn_implementation": given.attn_implementation or config.model.attn_implementation,
    }
    teacher = Teacher(load_model({**config.model, **chosen}, weights=weights))
    on_gpu = parallel.uses_gpu(config.trainer.accelerator)
    compile_model(teacher.model, config.trainer.compile, device="cuda" if on_gpu else "cpu")
    return teacher


def _check_vocabulary(student: PreTrainedModel, teacher: Teacher) -> None:
    theirs, own = (model.get_output_embeddings().weight.shape[0] for model in (teacher.model, student))
    if theirs != own:
        raise ValueError(f"teacher has {theirs} tokens in its vocabulary, the student {own}; they must have the same")


def open_store(config: DictConfig, stages: Sequence[Stage], *, source: Path, own: Path) -> TeacherStore | None:
    """Where the teacher's stored probabilities lie or will; None where no stage asks for them.

    Args:
        config: of the run.
        stages: of the run.
        source: the folder of the original model.
        own: the folder that a run without teacher.cache takes.
    """
    asked = {(stage.top.k, stage.top.temperature) for stage in stages if stage.top is not None}
    if not asked:
        return None
    if len(asked) > 1:
        raise ValueError("objective.kl_topk must have the same k and temperature in all stages")
    k, temperature = asked.pop()
    identity = {
        "teacher": _digest(Path(config.teacher.path or source)),
        "dtype": teacher_dtype(config),
        "k": k,
        "temperature": temperature,
    }
    folder = own if config.teacher.cache is None else Path(config.teacher.cache).expanduser()
    return TeacherStore(folder, identity)


def fill_store(
    config: DictConfig, store: TeacherStore, stages: Sequence[Stage], data: TextDataModule, *, source: Path
) -> None:
    """Stores what the stages that ask for it will train on; the teacher is loaded for this alone.

    `data` gives the training batches; the windows are those of the run, whoever trains on them later.
    """
    asked = [stage for stage in stages if stage.top is not None]
    top = asked[0].top
    assert top is not None
    accumulate = config.batch.accumulate * parallel.world_size(config.trainer)
    windows = enumerate(Windows(data.train_loader(), steps=asked[-1].end, accumulate=accumulate))
    needed = (batch for step, window in windows if any(s.first <= step < s.end for s in asked) for batch in window)
    tokens = config.batch.size * config.batch.seq_len * accumulate * sum(stage.steps for stage in asked)
    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(store.folder / ".lock"):
        store.refresh()
        missing = (batch for batch in needed if not all(key in store for key in keys_of(batch)))
        first = next(missing, None)
        if first is None:
            return
        if not len(store):
            require_space(store.folder, tokens=min(tokens, data.tokens_per_epoch or tokens), k=top.k)
        log.info("storing the teacher's %d most probable tokens in %s", top.k, store.folder)
        teacher = build_teacher(config, source)
        teacher.to(torch.device("cuda" if _on_gpu(config) else "cpu"))
        fill(store, teacher, chain([first], missing), k=top.k, temperature=top.temperature)


def teacher_dtype(config: DictConfig) -> str:
    """What the teacher computes in: bfloat16 on a GPU and float32 elsewhere, where the config leaves it open."""
    if config.teacher.dtype != "auto":
        return config.teacher.dtype
    return "bfloat16" if _on_gpu(config) else "float32"


def _on_gpu(config: DictConfig) -> bool:
    return parallel.uses_gpu(config.trainer.accelerator)


def _digest(model: Path) -> str:
    """Of a model's folder: its config, and of each file of weights the size, beginning and end."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
