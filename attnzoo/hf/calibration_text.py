"""Calibration text as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion import ConversionError

Text = Tensor | str | Path | Sequence[str]

SUFFIXES = {".txt", ".md", ".rst", ".py"}
_CHARACTERS = 12  # a token, at most, in nearly all text


def token_rows(text: Text, folder: Path | None, samples: int, length: int, *, name: str) -> Tensor:
    """`[rows, length]` token ids.

    Args:
        text: token ids `[rows, S]`, which are taken as they are; texts; or the path of a text file or a folder of them
            (.txt, .md, .rst, .py). From texts, pieces are taken that are spread evenly over them.
        folder: where the tokenizer is; None: there is none, and only token ids will do.
        samples, length: how many rows, of how many tokens.
        name: of the argument, for messages.

    Raises:
        ConversionError: for text of another kind, or too little of it.
    """
    if isinstance(text, Tensor):
        if text.ndim != 2 or text.dtype not in (torch.int64, torch.int32) or not text.numel():
            raise ConversionError(f"{name} must be token ids [rows, S], got {text.dtype} {list(text.shape)}")
        return text.long().cpu()
    texts = read_files(Path(text).expanduser(), name) if isinstance(text, str | Path) else list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ConversionError(f"{name} must be token ids, a path or texts, got {type(text).__name__}")
    if folder is None:
        raise ConversionError(f"{name} must be token ids [rows, S] for a model in memory, which has no tokenizer")
    from transformers import AutoTokenizer

    rows = _pieces(texts, AutoTokenizer.from_pretrained(folder), samples, length)
    if not rows:
        raise ConversionError(f"{name} has no piece of {length} tokens; give more text, or a shorter sample_length")
    return torch.tensor(rows)


def _pieces(texts: list[str], tokenizer: Any, samples: int, length: int) -> list[list[int]]:
    total = sum(map(len, texts))
    rows = []
    for text in texts:
        count = max(1, round(samples * len(text) / max(total, 1)))
        for number in range(count):
            start = len(text) * number // count
            piece = text[start : start + _CHARACTERS * length]
            ids = tokenizer(piece, add_special_tokens=False).input_ids[:length]
            if len(ids) == length:
                rows.append(ids)
    # The shortest texts may have given one piece each.
    return rows if len(rows) <= samples else [rows[len(rows) * n // samples] for n in range(samples)]


def read_files(path: Path, name: str) -> list[str]:
    """The texts of a file, or of a folder, in the order of their names; raises ConversionError where there is none."""
    files = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConversionError(f"{name} is {str(path)!r}, no text file and no folder with any of {sorted(SUFFIXES)}")
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]
