"""Folders that convert on text: layer by layer, going on where they were stopped, and whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnzoo import GQA
from attnzoo.conversion import ConversionError
from attnzoo.conversion.heads import MergeHeads
from attnzoo.hf import calibration_store, convert
from tests.conversion.models import logits, tiny

ROOT = Path(__file__).parents[2]


def ids(seed: int = 3, rows: int = 8) -> torch.Tensor:
    return torch.randint(3, 67, (rows, 24), generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, model_type: str = "llama", shard: str = "20KB", **changes) -> Path:
    tiny(model_type, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3", "opt", "mixtral"])
@pytest.mark.parametrize("method", ["svd", "refit"])
def test_a_folder_becomes_what_its_model_becomes(model_type, method, tmp_path):
    source = saved(tmp_path / "source", model_type)
    assert len(list(source.glob("*.safetensors"))) > 1
    text, found = ids(), []
    out = convert(source, GQA(1), method=method, calibration=text, out=tmp_path / "out", report=found.append)
    model = convert(tiny(model_type), GQA(1), method=method, calibration=text)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=model_type == "opt")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4 * logits(model).abs().max()
    assert found[0].cross_entropy > 0 and not found[0].held_out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert json.loads((out / "config.json").read_text())["attnzoo"]["calibration_tokens"] == 8 * 24


def test_a_conversion_that_was_stopped_goes_on_behind_its_last_layer(tmp_path, monkeypatch):
    source, real, converted = saved(tmp_path / "source"), MergeHeads.__call__, []

    def stopping(self, number, tensors, data):
        if number == 1 and not converted[1:]:
            raise KeyboardInterrupt
        converted.append(number)
        return real(self, number, tensors, data)

    monkeypatch.setattr(MergeHeads, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(source, GQA(1), calibration=ids(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.layers").is_dir()
    converted.append("again")
    convert(source, GQA(1), calibration=ids(), out=tmp_path / "out")
    assert converted == [0, "again", 1]
    assert not (tmp_path / ".out.layers").exists()
    monkeypatch.setattr(MergeHeads, "__call__", real)
    convert(source, GQA(1), calibration=ids(), out=tmp_path / "straight")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "straight" / path.name).read_bytes()


@pytest.mark.parametrize("changed", [{"calibration": ids(4)}, {"seed": 1}, {"method": "aligned"}])
def test_layers_of_another_conversion_are_not_taken_over(changed, tmp_path, monkeypatch):
    source, real, converted = saved(tmp_path / "source"), MergeHeads.__call__, []
    options = {"calibration": ids(), "out": tmp_path / "out"}

    def stopping(self, number, tensors, data):
        converted.append(number)
        if converted == [0, 1]:
            raise KeyboardInterrupt
        return real(self, number, tensors, data)

    monkeypatch.setattr(MergeHeads, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(source, GQA(1), **options)
    convert(source, GQA(1), **{**options, **changed})
    assert converted == [0, 1, 0, 1]


def test_a_refusal_leaves_nothing_behind(tmp_path):
    source = saved(tmp_path / "source")
    with pytest.raises(ConversionError, match="token ids"):
        convert(source, GQA(1), calibration=ids() + 60, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_activations_that_would_fill_the_memory_go_to_a_file(tmp_path, monkeypatch):
    source = saved(tmp_path / "source")
    convert(source, GQA(1), calibration=ids(), out=tmp_path / "memory")
    monkeypatch.setattr(calibration_store, "free_memory", lambda: 0)
    mapped, real = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: mapped.append(args[0]) or real(*args, **kwargs))
    convert(source, GQA(1), calibration=ids(), out=tmp_path / "file")
    assert mapped and all(Path(path).parent == tmp_path / ".file.layers" for path in mapped)
    for path in (tmp_path / "memory").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "file" / path.name).read_bytes()


# The peak is reset after the libraries are loaded and every code path has run once, on a small checkpoint.
_MEASURED = """
import sys
from pathlib import Path
import torch
from attnzoo import GQA
from attnzoo.hf import convert

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
small, large = sys.argv[1:]
ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
convert(small, GQA(1), calibration=ids, method="svd", out=small + "-out")
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert(large, GQA(1), calibration=ids, method="svd", out=large + "-out")
print(memory("VmHWM") - before)
"""


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of its memory from /proc")
def test_the_peak_of_memory_is_under_two_layers_and_what_they_compute(tmp_path):
    usual = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4}
    saved(tmp_path / "small", shard="5GB", **usual, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    large = tiny("llama", **usual, **sizes)
    layer = sum(parameter.nbytes for parameter in large.model.layers[0].parameters())
    large.save_pretrained(tmp_path / "large", max_shard_size="30MB")
    del large
    assert layer > 50e6 and len(list((tmp_path / "large").glob("*.safetensors"))) >= 8
    command = [sys.executable, "-c", _MEASURED, tmp_path / "small", tmp_path / "large"]
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    # What 32 tokens and two moments take is small beside a layer, and counted here at its size.
    activations = 8 * 32 * 8192 * 4 + 8 * 513 * 513 * 8
    assert peak < 2 * layer + activations, f"{peak / 1e6:.1f} MB, with layers of {layer / 1e6:.1f} MB"
