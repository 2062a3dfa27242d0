"""What one optimizer step computes."""

import pytest
import torch
import torch.nn.functional as F

import attnzoo
from recipes.data import TextDataModule
from recipes.models import load_model, load_tokenizer
from recipes.objectives import next_token
from recipes.packed import count_targets, pack
from tests.support.recipes import Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("objective", ["next_token", "kl", "layers", "mixture"])
def test_four_micro_batches_of_one_row_train_as_one_of_four(tiny, tmp_path, objective):
    # A larger eps keeps Adam from blowing rounding up where a gradient is next to nothing.
    common = ["batch.seq_len=32", "max_steps=6", "optimizer.eps=1e-3", "trainer.gradient_clip_norm=0.5"]
    common += [f"objective={objective}"]
    start = attnzoo.convert(tiny.model, attnzoo.GQA(num_kv_heads=1), out=tmp_path / "start")
    whole, curve = tiny.train(tmp_path / "4x1", *common, "batch.size=4", "batch.accumulate=1", start=start)
    split, curve_of_split = tiny.train(tmp_path / "1x4", *common, "batch.size=1", "batch.accumulate=4", start=start)
    before = load_model({**tiny.config().model, "path": str(start)}).state_dict()
    for (name, weight), other in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, atol=2e-6, rtol=1e-5, msg=name)
        assert torch.equal(weight, before[name]) == (objective == "layers" and ".self_attn." not in name)
    assert [point["tokens"] for point in curve] == [point["tokens"] for point in curve_of_split]
    targets = {int(count_targets(batch)) for batch in rows(tiny)}
    assert len(targets) > 1, "micro-batches of equal size would not tell a mean of means from the mean"


def rows(tiny):
    config = tiny.config()
    return TextDataModule(config.data, load_tokenizer(config.model), seq_len=32, batch_size=1).train_loader()


@pytest.mark.parametrize("attention", ["attnzoo", "sdpa"])
def test_the_loss_of_a_document_does_not_depend_on_the_one_before_it(tiny, attention):
    model = load_model({**tiny.config().model, "attn_implementation": attention})
    first, other, second = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(0)).numpy()
    losses = []
    for before in (first, other):
        batch = pack([before, second])
        batch["labels"][:, : len(before)] = -100
        losses.append(next_token(model, batch))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    alone = model(input_ids=torch.from_numpy(second)[None]).logits[0]
    expected = F.cross_entropy(alone[:-1], torch.from_numpy(second)[1:], reduction="sum")
    torch.testing.assert_close(losses[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("train", "part"), [("attention", ".self_attn."), ("layers", "model.layers."), ("all", "")])
def test_training_a_part_leaves_all_else_as_it_was(tiny, tmp_path, train, part):
    model, _ = tiny.train(tmp_path, f"train={train}", "max_steps=2")
    before = load_model(tiny.config().model).state_dict()
    for name, weight in model.state_dict().items():
        trains = part in name or (train == "layers" and name == "model.norm.weight")
        assert torch.equal(weight, before[name]) == (not trains), name


@pytest.mark.parametrize(
    "switch", ["trainer.gradient_checkpointing=true", "trainer.compile=true", "trainer.precision=bf16-mixed"]
)
def test_a_switch_changes_the_result_by_no_more_than_rounding(tiny, tmp_path, monkeypatch, switch):
    compiled = []

    def compile_without_inductor(self):  # which would take half a minute
        compiled.append(self)
        torch.nn.Module._compile_before(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "_compile_before", torch.nn.Module.compile, raising=False)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    _, curve = tiny.train(tmp_path / "plain", "max_steps=2")
    model, switched = tiny.train(tmp_path / "switched", "max_steps=2", switch)
    tolerance = 0.05 if "bf16" in switch else 1e-4
    for point, other in zip(curve, switched, strict=True):
        assert point["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=tolerance)
    assert model.is_gradient_checkpointing == ("checkpointing" in switch)
    assert bool(compiled) == ("compile" in switch)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_progress_bar_shows_loss_speed_rate_and_the_last_validation(tiny, tmp_path, capsys):
    tiny.train(tmp_path, "trainer.progress_bar=true", "max_steps=2")
    shown = "".join(capsys.readouterr()).rpartition("uptraining")[2]
    assert all(name in shown for name in ("2/2", "loss=", "tokens/s=", "lr=", "val=")), shown
