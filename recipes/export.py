"""Writes a trained model as a transformers folder and makes sure that it comes back the same."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import attnzoo.hf
from attnzoo.conversion import Refusal
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.latent_stock import as_deepseek
from recipes.embeddings import tie
from recipes.lora import merge_lora

log = logging.getLogger(__name__)

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Parts of the largest logit by which a model may differ from the folder that holds it in another form, with the
# rounding of its own arithmetic or, where that alone is more, with float64's.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


class ExportDiffers(ValueError):
    """The folder that was written gives another model than the one that was trained."""


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: str,
    tie_embeddings: bool = False,
) -> None:
    """Writes weights, config, generation config and tokenizer to `folder`, which appears whole or not at all.

    A model that a stock class holds becomes that class's folder, latent attention a deepseek_v3 one; any other brings
    the code of its attention with it.

    Args:
        model: adapters are merged and parameters cast to `dtype`, in place.
        dtype: float32, bfloat16 or float16.
        tie_embeddings: embeddings and head become their mean.

    Raises:
        ValueError: when `folder` exists.
        ExportDiffers: when the folder, read again, holds other weights.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; nothing is written over it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merge_lora(model)
        if tie_embeddings:
            tie(model)
        for parameter in model.parameters():  # not model.to, which would round the rotary frequencies too
            parameter.data = parameter.data.to(EXPORT_DTYPES[dtype])
        written = _write(model.eval(), partial)
        tokenizer.save_pretrained(partial)
        _require_equal(model, written, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Writes the model, and returns it in the form that it was written in."""
    if any(isinstance(module, SwappedLatentAttention) for module in model.modules()):
        try:
            stock = as_deepseek(model)
        except Refusal as refusal:
            log.warning("%s; so the model is written with the code of its attention", refusal)
        else:
            stock.save_pretrained(folder)
            return stock
    if isinstance(model, SwappedModel):
        attnzoo.hf.export(model, folder)
    else:
        model.save_pretrained(folder)
    return model


def _require_equal(model: PreTrainedModel, written: PreTrainedModel, folder: Path) -> None:
    """Every weight bit for bit, and the logits of a few tokens through the same attention implementation."""
    implementation = model.config._attn_implementation
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=implementation)
    again.to(model.device)
    theirs = again.state_dict()
    for name, weight in written.state_dict().items():
        if name not in theirs or not torch.equal(weight, theirs[name]):
            raise ExportDiffers(f"{folder}: {name} is not what was trained")
    trained = _logits(model)
    difference = float((trained - _logits(again)).abs().max())
    allowed = 1e-5 if written is model else ROUNDING[model.dtype] * float(trained.abs().max())
    if not difference <= allowed and written is not model:  # another function, or layer upon layer of rounding?
        wide = [copy.deepcopy(one).to("cpu", torch.float64) for one in (model, again)]
        difference = float((_logits(wide[0]) - _logits(wide[1])).abs().max())
    if not difference <= allowed:
        raise ExportDiffers(f"{folder}: its logits differ by {difference:.2e} from those of the model that was trained")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.compiler.set_stance("force_eager"):  # compiled or not, the same kernels have to compute both
        logits = model.eval()(tokens, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
