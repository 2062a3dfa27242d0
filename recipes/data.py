"""Text for training and evaluation: tokenised once, packed, documents kept apart, resumable at every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipes.data_config import DataConfig
from recipes.data_corpus import Corpus, Documents, open_corpus, texts
from recipes.data_mix import MixLoader
from recipes.data_rows import Pieces, RowLoader, Rows, TrainLoader
from recipes.data_stream import StreamLoader
from recipes.data_tokens import TokenStore, check_tokenizer, digest, encode, tokenised, tokenizer_digest

Share = tuple[np.ndarray, np.ndarray]  # starts and lengths of documents in a store


class TextDataModule(LightningDataModule):
    """Batches of packed text by a conf/data group (the fields of DataConfig).

    A batch is a dictionary of input_ids, labels and position_ids, int64 [1, T], and cu_seqlens, int32 [N + 1]; labels
    are the input ids with -100 at the first token of each document's piece, so that nothing is predicted across a
    boundary. T is batch_size * seq_len, less at the end of an epoch. Every training token comes once an epoch.

    Args:
        config: the data group.
        tokenizer: of transformers, with an eos token, which ends each document.
        seq_len: the longest piece of a document, in tokens.
        batch_size: rows of seq_len tokens in a batch.
        seed: of the order of the rows; what is held out does not depend on it.
        vocab_size: rows of the model's embedding, to check the tokenizer against.

    Raises ValueError for a bad config or tokenizer here, and for missing, empty or wrong data in `setup`.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        check_tokenizer(tokenizer, vocab_size)
        self.config = config if isinstance(config, DataConfig) else DataConfig.read(config)
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._train: Callable[[int, int], TrainLoader | StreamLoader | MixLoader] | None = None
        self._held_out: Rows | list[Pieces] = []
        self._domains: dict[str, TextDataModule] = {}
        self._tokens_per_epoch: int | None = None

    def prepare_data(self) -> None:
        """Fetches, converts and tokenises, so that `setup` finds it in the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the text and splits it; does nothing the second time."""
        if self._train is not None:
            return
        if self.config.domains:
            self._setup_domains()
            return
        corpus = open_corpus(self.config)
        if self.config.streaming:
            self._setup_stream(corpus)
        else:
            self._setup_stored(corpus)

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of the training text; None when streaming."""
        self.setup()
        return self._tokens_per_epoch

    def train_loader(self, *, rank: int = 0, world_size: int = 1) -> TrainLoader | StreamLoader | MixLoader:
        """A rank's training batches, with state_dict and load_state_dict: an epoch; endless from a stream or a mix."""
        self.setup()
        assert self._train is not None
        return self._train(rank, world_size)

    def val_batches(self) -> RowLoader:
        """All held-out batches, in order; iterable any number of times."""
        self.setup()
        return RowLoader(self._held_out, self.batch_size)

    def val_domains(self) -> dict[str, Iterable[dict[str, Tensor]]]:
        """The held-out batches by domain; all of them under "text" where the text is not divided."""
        self.setup()
        held_out = {name: one._held_out for name, one in self._domains.items()} or {"text": self._held_out}
        return {name: RowLoader(rows, self.batch_size) for name, rows in held_out.items()}

    def train_dataloader(self) -> TrainLoader | StreamLoader | MixLoader:
        """The training batches of the trainer's rank; all of them without a trainer.

        Lightning reads one batch ahead of a loader without a length, so a stream that resumes exactly goes through
        recipes.windows.Windows, which has one.
        """
        return self.train_loader(**self._ranks())

    def val_dataloader(self) -> RowLoader:
        """The held-out batches of the trainer's rank; all of them without a trainer."""
        self.setup()
        return RowLoader(self._held_out, self.batch_size, **self._ranks())

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _setup_domains(self) -> None:
        """One module a domain, whose rows take turns; held out is what each of them holds out."""
        for name in self.config.domains:
            self._domains[name] = TextDataModule(
                self.config.of_domain(name), self.tokenizer, seq_len=self.seq_len, batch_size=1, seed=self.seed
            )
            self._domains[name].setup()
        held_out = [one._held_out for one in self._domains.values()]
        self._held_out = [rows[row] for rows in held_out for row in range(len(rows))]
        sizes = [one.tokens_per_epoch for one in self._domains.values()]
        self._tokens_per_epoch = None if None in sizes else sum(sizes)
        self._train = lambda rank, world_size: MixLoader(
            {name: one.train_loader() for name, one in self._domains.items()},
            self.config.weights,
            self.batch_size,
            rank=rank,
            world_size=world_size,
        )

    def _setup_stored(self, corpus: Corpus) -> None:
        store = tokenised(corpus.train, corpus.column, self.tokenizer)
        self._require_text(store.lengths.sum())
        if corpus.held_out is None:
            train, held_out = split_by_content(store, self.config.val_fraction)
            held_out_ids = store.ids
        else:
            train = (store.starts, store.lengths)
            held_out_store = tokenised(corpus.held_out, corpus.column, self.tokenizer)
            held_out, held_out_ids = (held_out_store.starts, held_out_store.lengths), held_out_store.ids
        rows = Rows(store.ids, *train, self.seq_len)
        self._tokens_per_epoch = rows.tokens
        self._held_out = self._limit(Rows(held_out_ids, *held_out, self.seq_len))
        self._train = lambda rank, world_size: TrainLoader(
            rows, self.batch_size, seed=self.seed, data=store.content, rank=rank, world_size=world_size
        )

    def _limit(self, rows: Rows) -> Rows | list[Pieces]:
        """At most val_tokens of them, whole rows spread evenly over the text."""
        self._require_held_out(rows.tokens)
        if self.config.val_tokens is None or rows.tokens <= self.config.val_tokens:
            return rows
        count = max(1, self.config.val_tokens // self.seq_len)
        return [rows[row] for row in np.arange(count) * len(rows) // count]

    def _setup_stream(self, corpus: Corpus) -> None:
        limit = round(self.config.val_fraction * 2**64)
        if corpus.held_out is None:
            held_out = self._read_held_out(corpus.train, corpus.column, lambda ids: digest(ids) < limit)
            keep = lambda ids: digest(ids) >= limit  # noqa: E731
        else:
            held_out = self._read_held_out(corpus.held_out, corpus.column, lambda ids: True)
            keep = lambda ids: True  # noqa: E731
        self._held_out = [held_out[row] for row in range(len(held_out))]
        self._train = lambda rank, world_size: StreamLoader(
            lambda: open_corpus(self.config).train,
            corpus.column,
            self.tokenizer,
            keep=keep,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle_rows=self.config.shuffle_rows,
            data=f"{self.config.path} {tokenizer_digest(self.tokenizer)[:16]}",
            lanes=self.config.lanes,
            rank=rank,
            world_size=world_size,
        )

    def _read_held_out(self, documents: Documents, column: str, choose: Callable[[np.ndarray], bool]) -> Rows:
        """The first val_tokens tokens of the chosen documents."""
        wanted = self.config.val_tokens
        assert wanted is not None
        chosen: list[np.ndarray] = []
        for ids in encode(texts(documents, column), self.tokenizer, at_once=1):
            if wanted > 0 and len(ids) and choose(ids):
                chosen.append(ids[:wanted])
                wanted -= len(chosen[-1])
            if wanted == 0:
                break
        self._require_held_out(sum(map(len, chosen)))
        lengths = np.asarray([len(ids) for ids in chosen], dtype=np.int64)
        return Rows(np.concatenate(chosen), np.cumsum(lengths) - lengths, lengths, self.seq_len)

    def _require_text(self, tokens: int) -> None:
        if tokens < 2:
            raise ValueError(f"data.path is {self.config.path!r}, which holds no text to train on")

    def _require_held_out(self, tokens: int) -> None:
        if tokens < 2:
            raise ValueError(
                f"data.path is {self.config.path!r}, of which no text is held out: raise data.val_fraction "
                f"({self.config.val_fraction:g}), or name held-out text in data.val_path or data.val_split"
            )


def split_by_content(store: TokenStore, fraction: float) -> tuple[Share, Share]:
    """Train and held-out documents: those whose hash is among the lowest `fraction` of all hashes are held out.

    At least one document is; equal documents are on the same side. Of a single document its last tokens are held out.
    """
    if len(store.lengths) == 1:
        tail = max(1, round(fraction * int(store.lengths[0])))
        head = store.lengths - tail
        return (store.starts, head), (store.starts + head, np.asarray([tail]))
    limit = max(round(fraction * 2**64), int(store.digests.min()) + 1)
    held_out = store.digests < np.uint64(min(limit, 2**64 - 1))
    if held_out.all():
        raise ValueError(
            f"data.val_fraction is {fraction:g}, which holds out all {len(held_out)} documents; lower it, or cut the "
            "text into more documents (data.sample_by)"
        )
    return (store.starts[~held_out], store.lengths[~held_out]), (store.starts[held_out], store.lengths[held_out])
