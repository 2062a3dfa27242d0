"""Judges the models of a run on its held-out text, each once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from recipes.common import Common, of_model
from recipes.data import TextDataModule
from recipes.evaluate import Evaluation, evaluate
from recipes.evaluate_tasks import run_tasks
from recipes.models import load_model
from recipes.run_folder import RunFolder
from recipes.trainer import as_trained

log = logging.getLogger(__name__)

# What the numbers of an evaluation depend on beside the model and the tokenizer.
DECISIVE = ("data", "batch", "evaluate", "speed", "trainer.precision", "trainer.accelerator", "model")


class Judge:
    """`judge(name, folder)` adds the evaluation of a model's folder to the run, unless the run has it.

    Args:
        config: of the run.
        common: where evaluations of models that several runs have in common are kept.
    """

    def __init__(
        self,
        config: DictConfig,
        run: RunFolder,
        data: TextDataModule,
        tokenizer: PreTrainedTokenizerBase,
        common: Common,
    ) -> None:
        self.config = config
        self.run = run
        self.data = data
        self.tokenizer = tokenizer
        self.common = common

    def __call__(self, name: str, folder: Path, *, in_common: bool = False) -> None:
        if name in self.run.evaluations:
            return
        common = self.common if in_common else Common(None)
        chosen = {key: _plain(OmegaConf.select(self.config, key)) for key in DECISIVE}
        found = common.value("evaluations", [of_model(folder), chosen], lambda: self._judged(name, folder))
        self.run.add(Evaluation(**found | {"name": name}))

    def _judged(self, name: str, folder: Path) -> dict[str, Any]:
        log.info("evaluating the %s model", name)
        model = load_model({**self.config.model, "path": str(folder)})
        how = self.config.evaluate
        with as_trained(self.config.trainer) as device:
            found = evaluate(
                model,
                self.data.val_domains(),
                name=name,
                speed=self.config.speed,
                prompt_tokens=how.prompt_tokens,
                decode=None if name == "uptrained" else how.decode,  # it is as fast as the converted one
                tokenizer=self.tokenizer,
                prompts=how.prompts,
                sample_tokens=how.sample_tokens,
                device=device,
            )
            tasks = run_tasks(model, self.tokenizer, **how.harness)
        return dataclasses.asdict(dataclasses.replace(found, tasks=tasks))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
