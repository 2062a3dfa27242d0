"""Speed, MFU, memory and time left; and the batch of a step that was not finite."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import meters
from recipes.bad_batch import read_bad_step
from recipes.meters import Meters, clock, peak_flops, training_flops
from recipes.module import NotFinite
from recipes.objectives import next_token
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


def test_a_gpu_is_known_by_the_longest_name_that_fits():
    assert peak_flops("NVIDIA H100 PCIe", "bf16-mixed") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA GH200 480GB", "bf16-mixed") == peak_flops("NVIDIA H200", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA L40S", "32-true") == 91.6e12
    assert peak_flops("NVIDIA L4", "32-true") == 30.3e12
    assert peak_flops("NVIDIA B200", "32-true") is None
    assert peak_flops("NVIDIA GeForce MX150", "bf16-mixed") is None


def test_the_flops_of_a_token_are_three_forward_passes_and_fewer_where_little_trains():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    seen = 10 * 11 / 2  # pairs of a causal row of 10 tokens
    attention = 2 * 2 * (4 * 4) * 2 * seen / 10  # layers x (scores, values) x width x multiply and add, for a token
    assert training_flops(model, 10) == pytest.approx(3 * (2 * (layers + 50 * 16) + attention))
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    share = layers / (layers + 2 * 50 * 16)
    assert training_flops(model, 10) == pytest.approx(2 * (layers + 50 * 16) * (2 + share) + 3 * attention)
    assert training_flops(SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"model_type": "none"})), 10) is None


def test_a_meter_counts_tokens_over_the_time_of_steps_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meters, "training_flops", lambda *_: 6.0)
    monkeypatch.setattr(meters, "peak_flops", lambda *_: 150.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    logged = []
    logger = SimpleNamespace(log_metrics=lambda numbers, step: logged.append((step, numbers)))
    trainer = SimpleNamespace(global_step=4, log_every_n_steps=2, world_size=2, loggers=[logger])
    module = SimpleNamespace(model=None, tokens=1000, device=torch.device("cuda"), total_steps=10)
    meter = Meters(precision="bf16-mixed", seq_len=8)
    meter.on_train_start(trainer, module)
    meter.rest.on_train_start(trainer, module)
    for step in (5, 6):
        now[0] += 2
        trainer.global_step, module.tokens = step, module.tokens + 50
        meter.on_train_batch_end(trainer, module)
        now[0] += 4  # others validate and save
        meter.rest.on_train_batch_end(trainer, module)
    assert [step for step, _ in logged] == [6]
    assert meter.shown == {
        "tokens_per_s": 100 / 4,
        "memory_gib": 3.0,
        "mfu": 25 * 6 / 300,
        "seconds_left": 4 * 8 / 2,  # two steps took eight seconds, all counted
    }
    assert clock(3725.4) == "1:02:05"


def test_a_run_logs_speed_memory_and_time_left(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    uptrain(tiny.config("max_steps=3", "logger=csv"), run)
    rows = [*csv.DictReader((run.logs / "csv/from_step_0/metrics.csv").read_text().splitlines())]
    speeds = {int(row["step"]): row for row in rows if row["train/tokens_per_s"]}
    assert set(speeds) == {1, 2, 3}
    assert all(
        float(row["train/tokens_per_s"]) > 0 and float(row["train/memory_gib"]) > 0.01 for row in speeds.values()
    )
    assert float(speeds[1]["train/seconds_left"]) > float(speeds[3]["train/seconds_left"]) == 0


def test_the_batch_of_a_step_that_is_not_finite_is_kept_and_can_be_tried_again(tiny, tmp_path, monkeypatch):
    import recipes.objectives.objective as objective

    run, seen = RunFolder(tmp_path / "run"), []

    def diverging(self, model, batch, *rest, original=objective.Objective.__call__):
        loss = original(self, model, batch, *rest)
        if model.training:
            seen.append(batch)
        if len(seen) == 6:  # the second micro-batch of step 3
            loss.total.data.fill_(float("nan"))
        return loss

    with monkeypatch.context() as patch, pytest.raises(NotFinite):
        patch.setattr(objective.Objective, "__call__", diverging)
        uptrain(tiny.config("max_steps=5", "batch.accumulate=2", "batch.size=1", "seed=4"), run)
    folder = run.path / "not_finite" / "step_00000003"
    bad, window = read_bad_step(folder)
    assert (bad.step, bad.rank, bad.world_size, bad.micro_batches) == (3, 0, 1, 2)
    assert bad.loss != bad.loss
    assert json.loads((folder / "process_0.json").read_text())["torch_seed"] == bad.torch_seed
    for kept, batch in zip(window, seen[4:6], strict=True):
        assert kept.keys() == batch.keys()
        assert all(torch.equal(kept[key], batch[key]) for key in batch)
    from recipes.models import load_model

    model = load_model({**tiny.config().model, "path": str(run.converted)})
    assert next_token(model, window[1]).isfinite()  # the batch was not to blame
