"""One process's model in all of them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recipes import build, parallel
from recipes.build import build_student
from recipes.spread import Spreader
from recipes.uptrain import read_stages
from tests.support.processes import spawn
from tests.support.recipes import Tiny


class Model(nn.Module):
    """Two tied layers, a frozen weight, and buffers that a checkpoint has and has not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5, bias=False), nn.Linear(3, 5)
        self.last.weight = self.first.weight
        self.norm = nn.LayerNorm(3).requires_grad_(False)
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("angles", torch.linspace(0, 1, 7), persistent=False)


def other(rank: int, folder: str) -> None:
    """A process that has no weights, or rank 0, which has."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parallel.is_main_process = lambda: rank == 0  # type: ignore[assignment]
    torch.manual_seed(rank)
    with torch.device("cpu" if rank == 0 else "meta"):
        model = Model()
    if rank == 0:
        model = model.to(torch.bfloat16)
    spreader = Spreader(model, torch.device("cpu"))
    spreader.bring(model.last)
    spreader.bring(model)
    assert model.first.weight is model.last.weight
    torch.save((model.state_dict(), model.angles, model.norm.weight.requires_grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_have_what_the_first_one_loaded(tmp_path):
    spawn(other, str(tmp_path))
    (state, angles, trains), (others_state, others_angles, others_trains) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert state.keys() == others_state.keys() and state["last.weight"].dtype == torch.bfloat16
    assert all(torch.equal(others_state[name], value) for name, value in state.items())
    assert torch.equal(angles, others_angles) and trains == others_trains == False  # noqa: E712


@pytest.mark.parametrize(
    ("main", "overrides", "reads"),
    [
        (False, ["trainer.strategy=fsdp"], False),
        (True, ["trainer.strategy=fsdp"], True),
        (False, ["trainer.strategy=ddp"], True),
        (False, ["trainer.strategy=fsdp", "objective=layers"], True),
    ],
)
def test_only_the_main_process_of_fsdp_reads_weights(tmp_path, monkeypatch, main, overrides, reads):
    tiny = Tiny(tmp_path)
    config = tiny.config("max_steps=1", "batch.seq_len=32", *overrides)
    monkeypatch.setattr(build.parallel, "is_main_process", lambda: main)
    model = build_student(config, tiny.model, read_stages(config))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu" if reads else "meta"}
