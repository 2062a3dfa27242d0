"""Tokens of documents: encoding, and the store on disk that keeps a corpus from being tokenised twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from recipes.data_corpus import texts
from recipes.samples import cache_folder

STORE_VERSION = 1  # of the files below: another one makes them anew
DOCUMENTS_AT_ONCE = 64


class TokenStore:
    """All documents of a corpus, one after the other, read from disk as they are needed.

    ids: int32 [tokens]. starts, lengths: int64 [documents]. digests: uint64 [documents], hashes of their tokens.
    """

    def __init__(self, folder: Path) -> None:
        self.lengths = np.load(folder / "lengths.npy")
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.digests = np.load(folder / "digests.npy")
        ids = folder / "ids.bin"
        self.ids = np.memmap(ids, dtype=np.int32, mode="r") if len(self.lengths) else np.empty(0, np.int32)

    @property
    def content(self) -> str:
        """A hash of all documents' tokens, the same wherever the text lies."""
        return hashlib.blake2b(self.digests.astype("<u8").tobytes(), digest_size=8).hexdigest()


def tokenised(documents: Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """The tokens of `documents`, from the cache when the same data met the same tokenizer before."""
    identity = [STORE_VERSION, documents._fingerprint, column, tokenizer_digest(tokenizer)]
    folder = cache_folder() / "tokens" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: we hold the lock
            partial.mkdir()
            try:
                _write(partial, encode(texts(documents, column), tokenizer))
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return TokenStore(folder)


def encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, at_once: int = DOCUMENTS_AT_ONCE
) -> Iterator[np.ndarray]:
    """Token ids, int32 [n], of each text: with the special tokens that the tokenizer puts around it, and its eos last.

    A text without anything but white space gives an empty array.
    """
    end = tokenizer.eos_token_id
    several = iter(documents)
    while batch := list(islice(several, at_once)):
        for text, ids in zip(batch, tokenizer(batch, verbose=False)["input_ids"], strict=True):
            if not text.strip():
                ids = []
            elif ids[-1:] != [end]:
                ids = [*ids, end]
            yield np.asarray(ids, dtype=np.int32)


def digest(ids: np.ndarray) -> int:
    """A 64-bit hash of a document's tokens; which side of a random split it falls on depends on nothing else."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = backend.to_str()
    else:
        with TemporaryDirectory() as folder:
            files = sorted(Path(name) for name in tokenizer.save_pretrained(folder))
            description = "".join(f"{file.name} {file.read_bytes()!r}" for file in files if file.is_file())
    return hashlib.sha256(f"{description}{tokenizer.eos_token_id}".encode()).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raises ValueError for a tokenizer without an end-of-text token, or with ids that the embedding has no row for."""
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, which ends each document; set tokenizer.eos_token")
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"tokenizer gives ids up to {largest}, but the model's embedding has {vocab_size} rows (vocab_size): "
            "the tokenizer is not this model's, or the embedding was not resized to it"
        )


def _write(folder: Path, documents: Iterable[np.ndarray]) -> None:
    lengths, digests = [], []
    with (folder / "ids.bin").open("wb") as file:
        for ids in documents:
            if len(ids):
                file.write(ids.tobytes())
                lengths.append(len(ids))
                digests.append(digest(ids))
    np.save(folder / "lengths.npy", np.asarray(lengths, dtype=np.int64))
    np.save(folder / "digests.npy", np.asarray(digests, dtype=np.uint64))
