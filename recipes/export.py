"""Writes a trained model as a stock transformers folder and makes sure that it comes back the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportDiffers(ValueError):
    """The folder that was written gives another model than the one that was trained."""


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: str) -> None:
    """Writes weights, config, generation config and tokenizer to `folder`, which appears whole or not at all.

    Args:
        model: its parameters are cast to `dtype` in place.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: when `folder` exists.
        ExportDiffers: when the folder, read again, holds other weights.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; nothing is written over it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for parameter in model.parameters():  # not model.to, which would round the rotary frequencies too
            parameter.data = parameter.data.to(EXPORT_DTYPES[dtype])
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _require_equal(model, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_equal(model: PreTrainedModel, folder: Path) -> None:
    """Every weight bit for bit, and the logits of a few tokens through the same attention implementation."""
    implementation = model.config._attn_implementation
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=implementation)
    again.to(model.device)
    theirs = again.state_dict()
    for name, weight in model.state_dict().items():
        if name not in theirs or not torch.equal(weight, theirs[name]):
            raise ExportDiffers(f"{folder}: {name} is not what was trained")
    difference = float((_logits(model) - _logits(again)).abs().max())
    if not difference <= 1e-5:
        raise ExportDiffers(f"{folder}: its logits differ by {difference:.2e} from those of the model that was trained")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.compiler.set_stance("force_eager"):  # compiled or not, the same kernels have to compute both
        return model.eval()(tokens, use_cache=False).logits.float()
