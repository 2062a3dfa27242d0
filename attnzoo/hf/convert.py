"""`attnzoo.convert`: a stock checkpoint with fewer KV heads, from a folder or from a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from transformers import PreTrainedModel

from attnzoo.conversion.grouping import Grouping
from attnzoo.conversion.hybrid import Layers
from attnzoo.conversion.regress import STEPS
from attnzoo.hf.calibration_text import Text
from attnzoo.hf.heads_convert import Report, Request, convert_heads
from attnzoo.hf.hybrid_convert import convert_hybrid, wants_hybrid
from attnzoo.hf.latent_convert import convert_latent, wants_latent
from attnzoo.specs import Spec


@overload
def convert(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = ...,
    method: str = ...,
    calibration: Text | None = ...,
    out: str | Path,
    overwrite: bool = ...,
    seed: int = ...,
    held_out: Text | None = ...,
    samples: int = ...,
    sample_length: int = ...,
    grouping: Grouping = ...,
    steps: int = ...,
    report: Report | None = ...,
) -> Path: ...


@overload
def convert(
    source: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = ...,
    method: str = ...,
    calibration: Text | None = ...,
    out: str | Path | None = ...,
    overwrite: bool = ...,
    seed: int = ...,
    held_out: Text | None = ...,
    samples: int = ...,
    sample_length: int = ...,
    grouping: Grouping = ...,
    steps: int = ...,
    report: Report | None = ...,
) -> PreTrainedModel: ...


def convert(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = None,
    method: str = "auto",
    calibration: Text | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    held_out: Text | None = None,
    samples: int = 64,
    sample_length: int = 512,
    grouping: Grouping = "order",
    steps: int = STEPS,
    report: Report | None = None,
) -> Path | PreTrainedModel:
    """A checkpoint with fewer KV heads that stock transformers loads (arXiv 2305.13245).

    The result is of the same family; of another where that holds it and the own does not (GPT-NeoX and GPT-J become
    Phi, GPT-2 with one KV head GPTBigCode); or comes with its code (OPT, BLOOM, T5, other GPT-2), for
    `trust_remote_code`. A folder is converted shard by shard, without loading the model; a model in memory stays as it
    is, and the result shares no memory with it. With calibration text one layer after the other is read, converted
    behind the converted ones before it, and run; on a GPU if there is one. A conversion of a folder that was killed
    goes on behind its last finished layer when it is called again.

    Args:
        source: a checkpoint folder with config.json and safetensors, or a transformers model.
        spec: a GQA, or a list of equal ones, one a layer; or an MLA, see `attnzoo.hf.latent_convert.convert_latent`; or
            a GQA with a mask or a Linear for some layers, or a list, see `attnzoo.hf.hybrid_convert.convert_hybrid`.
        layers: which layers get a mask or linear attention: how many, or a `KVBudget`, chosen by measured damage; or
            their numbers; None: all.
        method: `mean`, `first` or `random`, or with calibration text `svd`, `aligned`, `refit` or `regress`; "auto" is
            `svd` with calibration text and `mean` without.
        calibration: text to convert by: token ids `[rows, S]`; or for a folder, whose tokenizer reads them, texts, or
            the path of a text file or of a folder of them.
        out: the folder to write; needed for a folder. It appears whole or not at all.
        overwrite: replace `out` if it is a checkpoint, once the new one is complete.
        seed: what `random` draws from, and the order of `regress`'s batches.
        held_out: text of the same kinds on which the damage is measured; None: the calibration text.
        samples, sample_length: how many pieces of how many tokens are taken from texts.
        grouping: "order" merges neighbours, "similarity" those heads that calibration text shows to be alike.
        steps: of gradient descent in each layer, for `regress` and a Linear's feature maps.
        report: called with the `Damage`, if there is text to measure it on.

    Returns:
        The path of `out` for a folder; for a model, a new one in the same dtype and mode, on the same device.

    Raises:
        ValueError: for anything wrong with the source or the request, before anything is written; `Refusal` where no
            stock class holds the result, saying what could.
    """
    if wants_hybrid(spec, layers):
        return convert_hybrid(
            source,
            spec,
            layers,
            method=method,
            calibration=calibration,
            out=out,
            overwrite=overwrite,
            seed=seed,
            held_out=held_out,
            samples=samples,
            sample_length=sample_length,
            steps=steps,
            report=report,
        )
    if wants_latent(spec):
        return convert_latent(
            source,
            spec,
            method=method,
            calibration=calibration,
            out=out,
            overwrite=overwrite,
            held_out=held_out,
            samples=samples,
            sample_length=sample_length,
            steps=steps,
            report=report,
        )
    if method == "auto":
        method = "mean" if calibration is None else "svd"
    return convert_heads(
        source,
        spec,
        Request(method, seed, grouping, steps, samples, sample_length, report),
        calibration=calibration,
        held_out=held_out,
        out=out,
        overwrite=overwrite,
    )
