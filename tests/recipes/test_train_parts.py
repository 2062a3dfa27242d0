"""The small parts of the uptraining recipe: its length, its learning rate, its windows."""

import math

import pytest
from torch import nn

from recipes.length import training_steps
from recipes.optim import build_optimizer, configure, learning_rate_factor
from recipes.trainer import choose_precision
from recipes.windows import Windows

LENGTH = {"alpha": None, "max_steps": None, "max_tokens": None, "tokens_per_step": 100}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_tokens": 700}, 7),
        ({"max_tokens": 701}, 8),
        ({"alpha": 0.05, "original_tokens": 20_000}, 10),
        ({"alpha": 0.05, "original_steps": 400, "original_tokens": 20_000}, 20),
        ({"alpha": 0, "original_steps": 400}, 0),
    ],
)
def test_the_length_of_a_run_is_steps_tokens_or_a_fraction_of_the_original_training(given, steps):
    assert training_steps(**{**LENGTH, **given}) == steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of alpha, max_steps, max_tokens; got none"),
        ({"alpha": 0.1, "max_steps": 3}, "got alpha=0.1, max_steps=3; set the others to null"),
        ({"alpha": 0.1}, "give model.original_tokens"),
        ({"max_steps": -1}, "max_steps must be a number of at least 0"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"max_tokens": math.nan}, "max_tokens must be a number"),
        ({"max_tokens": "many"}, "max_tokens must be a number"),
    ],
)
def test_a_length_that_is_not_clear_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        training_steps(**{**LENGTH, **given})


def test_the_learning_rate_warms_up_and_then_falls_along_a_cosine_or_stays():
    cosine = [
        learning_rate_factor(step, total_steps=10, schedule="cosine", warmup=0.2, final=0.1) for step in range(11)
    ]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.55)  # half way between step 2 and step 10
    assert cosine[10] == pytest.approx(0.1)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    line = [
        learning_rate_factor(step, total_steps=10, schedule="linear", warmup=0.2, final=0.2) for step in range(2, 11)
    ]
    assert line == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    constant = [learning_rate_factor(s, total_steps=10, schedule="constant", warmup=0.2, final=0.1) for s in range(11)]
    assert constant == [0.5] + [1.0] * 10


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, "adamw")
    configure(optimizer, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        id(model[0].weight): 0.3,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }
    assert optimizer.defaults["fused"]


class Counting:
    """Epochs of five micro-batches, numbered through."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        end = (self.next // 5 + 1) * 5
        while self.next < end:
            self.next += 1
            yield self.next - 1

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_windows_end_with_the_epoch_and_go_on_after_a_resume():
    whole = list(Windows(Counting(), steps=5, accumulate=2))
    assert whole == [[0, 1], [2, 3], [4], [5, 6], [7, 8]]
    for taken in range(5):
        first = Windows(Counting(), steps=5, accumulate=2)
        given = iter(first)
        before = [next(given) for _ in range(taken)]
        second = Windows(Counting(), steps=5, accumulate=2)
        second.load_state_dict(first.state_dict())
        assert before + list(second) == whole


def test_precision_is_bf16_only_where_the_hardware_multiplies_it():
    assert choose_precision("32-true", "cpu") == "32-true"
    assert choose_precision("auto", "cpu") in ("bf16-mixed", "32-true")
    assert choose_precision("auto", "mps") == "32-true"
