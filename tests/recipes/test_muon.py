"""Muon beside AdamW in one optimizer."""

import os
import signal

import pytest
import torch

from recipes.models import load_model
from recipes.module import Uptraining
from recipes.muon import MuonAdamW, orthogonalised
from recipes.optim import build_optimizer, configure
from tests.support.recipes import Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 16, 64)])
def test_what_is_left_of_a_matrix_is_its_orthogonal_factor(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalised(matrices).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3
    alike = torch.nn.functional.cosine_similarity(made.flatten(1), (left @ right).flatten(1))
    assert alike.min() > 0.97


def test_a_step_is_adamws_for_all_but_the_matrices_inside_of_layers_and_as_large_there(tiny):
    made = []
    for method in ("adamw", "muon"):
        model = load_model(tiny.config().model)
        optimizer = build_optimizer(model, method)
        configure(optimizer, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        for step in range(3):
            model.zero_grad()
            tokens = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        made.append({name: weight - before[name] for name, weight in model.state_dict().items()})
    for name, change in made[1].items():
        if "_proj" in name:
            ratio = change.square().mean().sqrt() / made[0][name].square().mean().sqrt()
            assert 0.1 < ratio < 0.6, name
        elif "norm" in name or name == "lm_head.weight":
            assert change.abs().max() > 0


def test_a_step_that_is_not_finite_changes_no_weight():
    weight, scale = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = MuonAdamW(
        [
            {"params": [weight], "orthogonal": True, "decays": True},
            {"params": [scale], "orthogonal": False, "decays": False},
        ],
        fused=True,
    )
    before = weight.detach().clone(), scale.detach().clone()
    weight.grad, scale.grad = torch.full((8, 4), float("nan")), torch.ones(4)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before[0]) and torch.equal(scale, before[1])
    optimizer.found_inf = torch.zeros(())
    weight.grad = torch.randn(8, 4)
    optimizer.step()
    assert not torch.equal(weight, before[0]) and not torch.equal(scale, before[1])


def test_a_run_learns_with_it_and_resumes_exactly(tiny, tmp_path, monkeypatch):
    common = ["optimizer=muon", "optimizer.lr=0.01", "max_steps=6", "batch.size=8"]
    whole, curve = tiny.train(tmp_path / "whole", *common)
    assert curve[-1]["cross_entropy"] < curve[0]["cross_entropy"] - 0.1

    def stopped(self, window, index, original=Uptraining.training_step):
        original(self, window, index)
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Uptraining, "training_step", stopped)
        with pytest.raises(SystemExit):
            tiny.train(tmp_path / "parts", *common)
    parts, resumed = tiny.train(tmp_path / "parts", *common)
    assert resumed == curve
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])
