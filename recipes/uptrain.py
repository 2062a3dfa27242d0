"""`attnzoo uptrain [overrides]`: convert a model to another attention, win its quality back, show what was won.

The whole main job, from top to bottom in `uptrain`. Every field is explained in conf/uptrain.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes import parallel
from recipes.bad_batch import KeepBadBatch
from recipes.build import build_objectives, build_student, fill_store, open_store
from recipes.calibration import FROM_DATA, calibrated
from recipes.check import check_config
from recipes.checkpointing import Checkpoints, last_checkpoint
from recipes.common import Common, of_model
from recipes.convert import changes_attention, check_method, convert_to_train, local_folder, read_spec
from recipes.data import TextDataModule
from recipes.data_rows import RowLoader
from recipes.evaluate_tasks import require_harness
from recipes.export import export
from recipes.judge import Judge
from recipes.length import training_steps
from recipes.lora import add_lora
from recipes.meters import Meters
from recipes.models import load_tokenizer
from recipes.module import Uptraining
from recipes.packed import Batch
from recipes.parallel import is_main_process
from recipes.report import write_report
from recipes.run_folder import RunFolder, git_commit
from recipes.stages import Stage, plan_stages
from recipes.teacher_store import TaughtData
from recipes.trainer import (
    build_loggers,
    build_trainer,
    choose_precision,
    prepare_for_training,
    trained_model,
)
from recipes.validation import Validation
from recipes.windows import WindowedData

log = logging.getLogger(__name__)

PROBE_TOKENS = 1 << 15  # that objectives measure what they need on

# A run that is resumed goes on in its folder; any other gets one by its name and the time.
OmegaConf.register_new_resolver("run_folder", parallel.folder_of_this_process, replace=True)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="uptrain")
def main(config: DictConfig) -> None:
    parallel.be_quiet()
    parallel.join(config.trainer.accelerator)
    run = RunFolder(parallel.run_folder(Path(HydraConfig.get().runtime.output_dir)))
    config = run.continued(config, HydraConfig.get().overrides.task)
    parallel.follow_launcher(config.trainer)
    run.adapt(config)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        parallel.require_processes_for_multirun(config.trainer)
    try:
        uptrain(config, run)
    finally:
        if is_main_process():
            run.drop_if_nothing_ran()


def uptrain(config: DictConfig, run: RunFolder) -> None:
    """Runs the main job in the folder of `run`; what an earlier, interrupted start has finished is not done again."""
    OmegaConf.resolve(config)
    check_config(config)
    require_harness(config.evaluate.harness.tasks)
    config.trainer.precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    seed_everything(config.seed, verbose=False)
    source = local_folder(config.model)
    spec = read_spec(config.attention)
    convert = changes_attention(source, spec)
    if convert:
        check_method(spec, config.convert.method)
    common = Common(config.common)
    start = common.place("converted", identity(config, source), own=run.converted) if convert else source
    tokenizer = load_tokenizer(config.model)
    stages = read_stages(config)
    steps = stages[-1].end
    data = open_data(config, tokenizer, source)
    if not is_main_process():
        parallel.wait_for_all()  # for the converted model; Lightning starts the others only then
        train(config, run, data, source=source, start=start, stages=stages)
        parallel.wait_for_all()  # for the report, so that all end together
        return
    run.start(config, seeds={"everything": config.seed, "convert": config.convert.seed})

    judge = Judge(config, run, data, tokenizer, common)
    if convert:
        log.info("converting %s to %s", source, spec)
        with calibrated(config.convert, data) as how:
            common.once(start, lambda: convert_to_train(source, spec, start, how))
    judge("original", source, in_common=True)
    if convert:
        judge("converted", start, in_common=True)
    store = open_store(config, stages, source=source, own=run.path / "teacher")
    if store is not None:
        fill_store(config, store, stages, data, source=source)
    log.info("training for %d steps", steps)
    parallel.wait_for_all()
    model, curve = train(config, run, data, source=source, start=start, stages=stages)
    if not run.uptrained.is_dir():
        tied = config.untie_embeddings == "tie"
        export(model, tokenizer, run.uptrained, dtype=config.export_dtype, tie_embeddings=tied)
    judge("uptrained", run.uptrained)
    write_report(run.path, evaluations=list(run.evaluations.values()), curve=curve, meta=summary(config, steps, curve))
    parallel.wait_for_all()
    log.info("the uptrained model lies in %s, the report in %s", run.uptrained, run.path / "report.md")


def identity(config: DictConfig, source: Path) -> list[Any]:
    """What tells the converted model of a run from those of others."""
    told = OmegaConf.to_container(config)
    text = [told["data"], told["batch"]["seq_len"], told["seed"]] if config.convert.calibration == FROM_DATA else []
    return [of_model(source), told["attention"], told["convert"], *text]


def open_data(config: DictConfig, tokenizer: PreTrainedTokenizerBase, source: Path) -> TextDataModule:
    """The text, tokenised; a tokenizer that does not fit the model and an empty text are refused."""
    data = TextDataModule(
        config.data,
        tokenizer,
        seq_len=config.batch.seq_len,
        batch_size=config.batch.size,
        seed=config.seed,
        vocab_size=AutoConfig.from_pretrained(source).get_text_config().vocab_size,
    )
    data.prepare_data()
    return data


def read_stages(config: DictConfig) -> list[Stage]:
    """The stages of the run; the last one's end is its number of steps."""
    batch = config.batch
    tokens = batch.size * batch.seq_len * batch.accumulate * parallel.world_size(config.trainer)
    lengths = {key: config[key] for key in ("alpha", "max_steps", "max_tokens")}
    steps = None
    if not config.stages or any(length is not None for length in lengths.values()):
        steps = training_steps(
            **lengths,
            tokens_per_step=tokens,
            original_steps=config.model.get("original_steps"),
            original_tokens=config.model.get("original_tokens"),
        )
    return plan_stages(OmegaConf.to_container(config), steps=steps, tokens_per_step=tokens)


def summary(config: DictConfig, steps: int, curve: list[dict[str, float]]) -> dict[str, object]:
    """What the report says of the run; config.yaml says the rest."""
    return {
        "run": config.name,
        "model": config.model.path,
        "attention": OmegaConf.to_container(config.attention),
        "conversion": config.convert.method,
        "text": config.data.path,
        "objective": OmegaConf.to_container(config.stages or config.objective),
        "trained": OmegaConf.to_container(config).get("train"),
        "steps": steps,
        "tokens": curve[-1]["tokens"] if curve else 0,
        "precision": config.trainer.precision,
        "seed": config.seed,
        "code": git_commit(),
    }


def probe(data: TextDataModule, seq_len: int) -> Iterable[Batch]:
    """The first held-out rows, one a batch: the same however large a batch is."""
    return islice(RowLoader(data.val_batches().rows, 1), max(1, PROBE_TOKENS // seq_len))


def train(
    config: DictConfig, run: RunFolder, data: TextDataModule, *, source: Path, start: Path, stages: list[Stage]
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Trains the model in `start`, from the run's last checkpoint where there is one; the model and its curve.

    `source` is the original model. Exits when the process was asked to stop, after a checkpoint.
    """
    model = build_student(config, start, stages)
    steps = stages[-1].end
    if not steps:
        return model, []
    resumed = last_checkpoint(run.checkpoints)
    first_step = int(resumed.name.removeprefix("step_")) if resumed else 0
    objectives = build_objectives(config, model, stages, source=source, first_step=first_step)
    if config.lora is not None:
        add_lora(model, config.lora, seed=config.seed)
    prepare_for_training(
        model,
        gradient_checkpointing=config.trainer.gradient_checkpointing,
        compile=config.trainer.compile,
        accelerator=config.trainer.accelerator,
    )
    module = Uptraining(
        model,
        stages,
        objectives,
        gradient_clip_norm=config.trainer.gradient_clip_norm,
        seed=config.seed,
        probe=lambda: probe(data, config.batch.seq_len),
    )
    del objectives  # the module lets the teacher go when no stage needs it any more
    validation = Validation(
        data.val_domains,
        every_n_steps=config.validation.every_n_steps,
        at_tokens=config.validation.at_tokens,
        limit=config.validation.batches,
    )
    meters = Meters(precision=config.trainer.precision, seq_len=config.batch.seq_len)
    checkpoints = Checkpoints(run.checkpoints, **config.checkpoint)
    trainer = build_trainer(
        config.trainer,
        max_steps=steps,
        callbacks=[meters, validation, checkpoints, KeepBadBatch(run.path / "not_finite"), meters.rest],
        loggers=build_loggers(config.logger, folder=run.logs, first_step=first_step),
    )
    store = open_store(config, stages, source=source, own=run.path / "teacher")
    taught = data if store is None else TaughtData(data, store)
    windows = WindowedData(taught, steps=steps, accumulate=config.batch.accumulate)
    trainer.fit(module, datamodule=windows, ckpt_path=resumed)
    if checkpoints.stopped_by is not None and trainer.global_step < steps:
        log.warning("stopped after step %d; resume=%s goes on from there", trainer.global_step, run.path)
        checkpoints.leave()
    return trained_model(trainer, model), validation.curve


if __name__ == "__main__":
    main()
