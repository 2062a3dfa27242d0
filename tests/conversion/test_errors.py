"""Bad input: each kind gets its own message, and nothing is written, neither the output nor anything beside it."""

import errno
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnzoo.conversion import ConversionError, Refusal, UnknownFamily, convert_checkpoint
from attnzoo.conversion import checkpoint as room
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA
from tests.conversion.models import tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    tiny("qwen2").save_pretrained(folder / "single")
    tiny("qwen2").save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def single(pristine, tmp_path):
    return _copy(pristine / "single", tmp_path)


@pytest.fixture
def sharded(pristine, tmp_path):
    return _copy(pristine / "sharded", tmp_path)


def _copy(folder: Path, into: Path) -> Path:
    (into / "source").mkdir()
    for path in folder.iterdir():
        (into / "source" / path.name).write_bytes(path.read_bytes())
    return into / "source"


def refused(source, spec=None, *, match, kind=ConversionError, **options):
    """Convert `source` to a sibling and expect the error, with the folder around them as it was."""
    out = options.pop("out", source.parent / "out")
    before = snapshot(source.parent)
    with pytest.raises(kind, match=match) as caught:
        convert_checkpoint(source, spec or GQA(2), out, **options)
    assert isinstance(caught.value, ValueError)
    assert snapshot(source.parent) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def edit_config(source: Path, **changes) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def test_requests_that_cannot_be_met(single):
    refused(single, GQA(4), match=r"num_kv_heads must divide the model's 6 KV heads, so be one of 1, 2, 3, 6; got 4")
    refused(single, method="svd", match=r"method must be one of mean, first, random, got 'svd'")
    refused(single, [GQA(2)], match="spec lists 1 layers, the model has 2")
    refused(single, [GQA(2), GQA(3)], match="one number of KV heads", kind=Refusal)
    refused(single, ["gqa", "gqa"], match="spec must be a GQA")
    refused(single, GQA(2, mask=SlidingWindow(4) & SlidingWindow(5)), match="mask", kind=Refusal)


def test_an_unknown_family_or_config(single):
    edit_config(single, model_type="mamba")
    refused(single, match=r"'mamba' is not among the known families .*llama.*qwen2", kind=UnknownFamily)
    edit_config(single, model_type="llama", hidden_size="48")
    refused(single, match="needs a positive integer 'hidden_size', got '48'")
    edit_config(single, hidden_size=48, num_key_value_heads=4)
    refused(single, match="6 attention heads, not a multiple of its 4 KV heads")
    edit_config(single, num_key_value_heads=6, quantization_config={"quant_method": "gptq"})
    refused(single, match=r"quantised \(gptq\); dequantise")
    (single / "config.json").write_text("{")
    refused(single, match=r"config\.json is not valid JSON")
    (single / "config.json").write_text("[]")
    refused(single, match=r"config\.json holds no JSON object")
    (single / "config.json").unlink()
    refused(single, match=r"config\.json is missing")


def test_a_family_that_cannot_hold_it(tmp_path):
    tiny("gpt_neox", use_parallel_residual=False).save_pretrained(tmp_path / "source")
    refused(tmp_path / "source", match=r"no stock class holds GPT-NeoX.*Phi.*attnzoo\.swap", kind=Refusal)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_infinity_in_any_weight(single, name, value):
    edit_tensors(single, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(single, match=rf"tensor {name} of .*model\.safetensors holds NaN or infinity")


def test_a_tensor_that_is_missing_or_of_another_shape_or_kind(single):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(single, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    refused(single, match=r"model\.layers\.1\.self_attn.*k_proj\.weight has shape \[48, 47\].*\[48, 48\]")
    edit_tensors(single, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(single, match=f"tensor {name} of .* stored as I8")
    edit_tensors(single, lambda tensors: tensors.pop(name))
    refused(single, match=f"tensor {name} is missing from")
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(48, 48)}))
    for other in (
        "layers.0.mlp.up_proj.weight",
        "layers.1.self_attn.k_proj.bias",
        "norm.weight",
        "embed_tokens.weight",
    ):
        kept = load_file(single / "model.safetensors")[f"model.{other}"].clone()
        edit_tensors(single, lambda tensors, other=other: tensors.pop(f"model.{other}"))
        refused(single, match=rf"tensor model\.{other} is missing from")
        edit_tensors(single, lambda tensors, other=other, kept=kept: tensors.update({f"model.{other}": kept}))
    edit_config(single, tie_word_embeddings=False)
    refused(single, match=r"tensor lm_head\.weight is missing from")
    edit_config(single, tie_word_embeddings=True)
    edit_tensors(single, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1.self_attn" in n])
    refused(single, match=r"tensor model\.layers\.1\.self_attn\.q_proj\.weight is missing")
    edit_config(single, num_hidden_layers=1)
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(48, 48)}))
    refused(single, match="tensors of layer 1; its config says 1 layers")
    edit_tensors(single, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1" in n])
    edit_tensors(single, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)}))
    refused(single, match=r"q_proj\.lora_A is not a tensor of a plain qwen2 attention")
    edit_tensors(single, lambda tensors: [tensors.pop(n) for n in list(tensors) if "self_attn" in n])
    refused(single, match=r"no qwen2 attention")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(sharded, left):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    refused(sharded, match=rf"{shard.name} is truncated or not a safetensors file")


def test_an_index_that_does_not_fit_its_shards(sharded):
    path = sharded / "model.safetensors.index.json"
    text = path.read_text()
    index = json.loads(text)
    files = Counter(index["weight_map"].values())
    name, shard = next(item for item in sorted(index["weight_map"].items()) if files[item[1]] > 1)
    for other in ("model-00009-of-00002.safetensors", "../pristine/model.safetensors"):
        path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | {name: other}}))
        refused(sharded, match="names the file .*, which is not in the folder")
    path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | {"model.ghost": shard}}))
    refused(sharded, match=rf"tensor model\.ghost is missing from .*{shard}")
    path.write_text(json.dumps({**index, "weight_map": {k: v for k, v in index["weight_map"].items() if k != name}}))
    refused(sharded, match=rf"tensor {name} of .*{shard} is missing from")
    path.write_text("{}")
    refused(sharded, match="has no weight_map")
    path.write_text(text)
    (sharded / shard).unlink()
    refused(sharded, match=rf"names the file '{shard}', which is not in the folder")


def test_formats_that_are_not_read(single):
    weights = single / "model.safetensors"
    weights.rename(single / "pytorch_model.bin")
    refused(single, match=r"pickle \(\.bin\).*save_pretrained\(.*safe_serialization=True")
    (single / "pytorch_model.bin").rename(single / "model.Q4_1.gguf")
    refused(single, match=r"is GGUF.*gguf_file=")
    with pytest.raises(ConversionError, match=r"is GGUF.*gguf_file="):
        convert_checkpoint(single / "model.Q4_1.gguf", GQA(2), single.parent / "out")
    (single / "model.Q4_1.gguf").unlink()
    refused(single, match=r"holds neither model\.safetensors nor")
    with pytest.raises(ConversionError, match="is not a folder"):
        convert_checkpoint(single / "nowhere", GQA(2), single.parent / "out")


def test_output_folders_that_must_not_be_written(single):
    out = single.parent / "out"
    refused(single, out=single, overwrite=True, match="is or contains the source")
    refused(single, out=single, match="exists already")
    (single.parent / "config.json").write_text("{}")
    refused(single, out=single.parent, overwrite=True, match="is or contains the source")
    out.mkdir()
    refused(single, match="exists already; choose another folder, or pass overwrite=True")
    (out / "thesis.tex").write_text("years of work")
    refused(single, overwrite=True, match=r"no checkpoint folder \(no config\.json\)")
    (out / "thesis.tex").unlink()
    out.rmdir()
    out.write_text("a file")
    refused(single, overwrite=True, match="no checkpoint folder")


def test_too_little_space_is_seen_before_anything_is_written(single, monkeypatch):
    needed = (single / "model.safetensors").stat().st_size // 2
    usage = room.shutil.disk_usage(single)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: pytest.fail("a folder was made"))
    refused(single, match=r"needs 0\.\d MB on its disk, and 0\.\d MB are free; nothing was kept")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(single, monkeypatch, code):
    real, calls = room.ShardWriter.write, []

    def write(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            raise OSError(code, os.strerror(code))
        real(self, name, tensor)

    monkeypatch.setattr(room.ShardWriter, "write", write)
    refused(single, match="needs .* MB on its disk")
    assert len(calls) == 5


def test_other_errors_of_the_disk_pass_through_and_leave_nothing(single, monkeypatch):
    def copyfile(*args):
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(room.shutil, "copyfile", copyfile)
    before = snapshot(single.parent)
    with pytest.raises(PermissionError):
        convert_checkpoint(single, GQA(2), single.parent / "out")
    assert snapshot(single.parent) == before
