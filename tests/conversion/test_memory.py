"""A folder converts without the model in memory: the peak of a process, on a checkpoint of many shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]

# The peak is reset after the libraries are loaded and every code path has run once, on a small checkpoint.
_MEASURED = """
import sys
from pathlib import Path
from attnzoo.conversion import convert_checkpoint
from attnzoo.specs import GQA

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, large = sys.argv[1:]
convert_checkpoint(small, GQA(1), small + "-out")
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert_checkpoint(large, GQA(1), large + "-out")
print(memory("VmHWM") - before)
"""


def many_shards(folder: Path, model_type: str, dim: int, layers: int) -> int:
    """A checkpoint of one shard a layer, and one for the embeddings; returns the size of the largest shard."""
    folder.mkdir()
    weight_map, sizes = {}, []
    outside = ("model.embed_tokens", "model.norm")
    if model_type == "gpt2":
        outside = ("transformer.wte", "transformer.wpe", "transformer.ln_f")
    rest = {f"{name}.weight": torch.ones(2, dim) for name in outside} | {"transformer.ln_f.bias": torch.ones(dim)}
    save_file(rest, folder / "model-rest.safetensors")
    weight_map |= dict.fromkeys(rest, "model-rest.safetensors")
    for layer in range(layers):
        if model_type == "llama":
            shapes = dict.fromkeys((f"self_attn.{x}_proj.weight" for x in "qkvo"), (dim, dim))
            shapes |= {f"mlp.{x}_proj.weight": (dim, 2 * dim) for x in ("up", "gate")}
            tensors = {f"model.layers.{layer}.{name}": torch.ones(shape) for name, shape in shapes.items()}
        else:
            shapes = {"attn.c_attn": (dim, 3 * dim), "attn.c_proj": (dim, dim), "mlp.c_fc": (dim, 4 * dim)}
            tensors = {f"transformer.h.{layer}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
            tensors |= {f"transformer.h.{layer}.{name}.bias": torch.ones(shapes[name][1]) for name in shapes}
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, folder / f"model-{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    config = {"model_type": model_type, "num_hidden_layers": layers, "hidden_size": dim, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(sizes)


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2's weights are all transposed: nothing is merely copied
def test_the_peak_of_memory_is_under_two_shards(model_type, tmp_path):
    many_shards(tmp_path / "small", model_type, 64, 1)
    layers = 8
    shard = many_shards(tmp_path / "large", model_type, 768, layers)
    assert shard > 15e6
    # The kernel drops and reads back pages of the libraries as it likes, which only adds: the smallest of three counts.
    peaks = []
    for number in range(3):
        places = [tmp_path / f"{size}-{number}" for size in ("small", "large")]
        for place in places:
            place.symlink_to(tmp_path / place.name.partition("-")[0])
        command = [sys.executable, "-c", _MEASURED, *places]
        peaks.append(int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
        if peaks[-1] < 2 * shard:
            break
    peak = min(peaks)
    assert peak < 2 * shard, f"{peak / 1e6:.1f} MB, with shards of {shard / 1e6:.1f} MB"
    assert len(list((tmp_path / "large-0-out").glob("*.safetensors"))) == layers + 1
