"""What tests of the recipes share: configs composed as on the command line, and commands run in this process."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from transformers import PreTrainedModel

from recipes.data import TextDataModule
from recipes.models import load_tokenizer
from recipes.run_folder import RunFolder
from recipes.uptrain import read_stages, train
from tests.support.tiny_llama import save_text, save_tiny_llama


class Tiny:
    """A tiny model and text in `folder`, and the overrides that train it in an instant."""

    def __init__(self, folder: Path, **model) -> None:
        self.folder = folder
        self.model = save_tiny_llama(folder / "model", **model)
        self.text = save_text(folder / "text")
        self.overrides = [
            "experiment=quick",
            f"model.path={self.model}",
            "data=text",
            f"data.path={self.text}",
            "data.val_fraction=0.2",
            "trainer=cpu",
            "trainer.precision=32-true",
            "trainer.progress_bar=false",
            "logger=none",
            "optimizer.lr=0.01",
        ]

    def config(self, *overrides: str) -> DictConfig:
        with initialize_config_module("conf", version_base="1.3"):
            return compose("uptrain", [*self.overrides, *overrides])

    def train(self, folder: Path, *overrides: str, start: Path | None = None) -> tuple[PreTrainedModel, list[dict]]:
        """The model after the steps of a config, and its curve; of `start`, without any conversion."""
        config = self.config(*overrides)
        data = TextDataModule(
            config.data, load_tokenizer(config.model), seq_len=config.batch.seq_len, batch_size=config.batch.size
        )
        stages = read_stages(config)
        return train(config, RunFolder(folder), data, source=self.model, start=start or self.model, stages=stages)


def run_command(monkeypatch: pytest.MonkeyPatch, main, *overrides: str) -> None:
    """As `attnzoo <command> overrides`, in this process; exceptions come out."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["attnzoo", *overrides])
    main()
