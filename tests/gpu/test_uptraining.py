"""Steps of uptraining on a GPU: nothing waits for the device, and what is not finite changes no weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

import attnzoo
from attnzoo import GQA, MLA, Linear
from recipes.models import load_model
from recipes.module import NotFinite, Uptraining
from recipes.objectives import Objective, read_terms
from recipes.objectives.layers import LayerErrors
from recipes.packed import Batch, pack
from recipes.stages import Stage
from recipes.teacher import Teacher
from tests.support.tiny_llama import save_tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIMIZER = {
    "method": "adamw",
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "schedule": "constant",
    "warmup": 0.0,
    "final": 0.0,
}
TERMS = {"ce": {}, "kl": {}, "layers": {"weight": 0.1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def load(folder):
    config = {"path": str(folder), "dtype": "float32", "trust_remote_code": False, "attn_implementation": "attnzoo"}
    return load_model(config)


def batches() -> Iterator[Batch]:
    random = np.random.default_rng(0)
    while True:
        yield pack([random.integers(2, 60, size) for size in (40, 7, 81)])


class Data(LightningDataModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self):
        windows = [[batch] for batch, _ in zip(batches(), range(self.steps), strict=False)]
        yield from windows


class At(Callback):
    """Does something before one step."""

    def __init__(self, step: int, what) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == self.step:
            self.what(module)


def trained(folder, steps, *callbacks, spec=None, method="adamw"):
    torch.manual_seed(0)
    student = attnzoo.convert(load(folder), spec or GQA(num_kv_heads=1)).train()
    teacher = Teacher(load(folder).bfloat16())
    terms = read_terms(TERMS)
    objective = Objective(terms, teacher=teacher, layers=LayerErrors(student, teacher))
    stage = Stage("only", 0, steps, terms, "all", {**OPTIMIZER, "method": method, "momentum": 0.95})
    module = Uptraining(student, [stage], [objective], gradient_clip_norm=1.0, probe=lambda: [next(batches())])
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data(steps))
    return module


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize(
    "spec",
    [GQA(num_kv_heads=1), MLA(kv_lora_rank=8, qk_rope_head_dim=4), [Linear(feature_map="hedgehog", window=8), GQA()]],
    ids=["mqa", "mla", "linear"],
)
def test_a_step_does_not_wait_for_the_device(folder, spec, method):
    """The fourth step runs where every wait raises; the first ones compile kernels."""

    class Strict(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            torch.cuda.set_sync_debug_mode("error" if index == 3 else "default")

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    try:
        module = trained(folder, 6, Strict(), spec=spec, method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.tokens == 6 * 128
    assert {"loss", "ce", "kl", "layers", "gradient_norm", "lr"} <= set(module.shown)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_step_that_is_not_finite_and_those_behind_it_change_no_weight(folder, method):
    before, spoiled = {}, []

    def spoil(module):
        spoiled.append(module)
        before.update({name: weight.clone() for name, weight in module.model.state_dict().items()})
        module.model.model.norm.weight.data[0] = float("nan")

    with pytest.raises(NotFinite, match="step 4: the loss is nan") as stopped:
        trained(folder, 8, At(3, spoil), method=method)
    assert stopped.value.step == 4 and stopped.value.window[0]["input_ids"].shape == (1, 128)
    for name, weight in spoiled[0].model.state_dict().items():
        if name != "model.norm.weight":
            assert torch.equal(weight, before[name].to(weight.device)), name
