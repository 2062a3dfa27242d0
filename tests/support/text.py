"""Tiny text, tokenizers and folders for tests of the recipes; nothing touches the user's caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

EOS = 0


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Each word is a token, numbered from 1; 0 is the end of a text."""
    vocabulary = {"<eos>": EOS} | {word: number for number, word in enumerate(dict.fromkeys(words), start=1)}
    backend = Tokenizer(WordLevel(vocabulary))
    backend.pre_tokenizer = Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def documents(lengths: list[int]) -> list[str]:
    """Documents of so many words, no word twice in all of them."""
    return [" ".join(f"d{number}w{place}" for place in range(length)) for number, length in enumerate(lengths)]


def write_corpus(folder: Path, texts: list[str], kind: str = "text", column: str = "text") -> Path:
    """Writes the documents as a folder of text files, or as one JSON-lines or parquet file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
        return folder
    if kind == "jsonl":
        path = folder / "corpus.jsonl"
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
        return path
    from datasets import Dataset

    path = folder / "corpus.parquet"
    Dataset.from_dict({column: texts}).to_parquet(path)
    return path


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of the recipes and of `datasets` that belong to one test."""
    import datasets

    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "attnzoo-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path
