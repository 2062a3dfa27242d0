"""What a conf/data group may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

FORMATS = ("auto", "text", "jsonl", "parquet", "hub")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and what of it is held out.

    path: `sample:NAME`, a file, a folder, a glob, or a hub id.
    format: auto, text, jsonl, parquet or hub; auto goes by the names of the files.
    column: the column that holds the text, of JSON lines, parquet and hub data.
    subset, split: of a hub dataset.
    sample_by: what a document is in text files: the whole file (document), a paragraph or a line.
    val_path: held-out text in the same format; nothing of `path` is held out then.
    val_split: the same, as another split of a hub dataset.
    val_files: file names or globs; files of `path` with these names are held out. When `path` has none of them,
        val_fraction decides.
    val_fraction: the part of the documents that is held out otherwise, chosen by their content, so that equal documents
        are on one side. Of a single document it is the end.
    val_tokens: take at most about this many tokens for evaluation, spread over the held-out text (streaming: its
        beginning); None takes all.
    streaming: read and tokenise while training, for text that is larger than the disk or the patience.
    shuffle_rows: rows that are shuffled together when streaming.
    lanes: parts that a stream is divided into, each read and tokenised by one process; None takes as many as there are
        processes. A run goes on with any number of processes that divides it.
    domains: several sources in one stream: by name, a weight (the domain's share of the rows) and whatever of the
        fields above is the domain's own, the others being as the group says. Held-out text is then judged by domain.
    """

    path: str
    format: str = "auto"
    column: str = "text"
    subset: str | None = None
    split: str = "train"
    sample_by: str = "document"
    val_path: str | None = None
    val_split: str | None = None
    val_files: tuple[str, ...] = ()
    val_fraction: float = 0.05
    val_tokens: int | None = None
    streaming: bool = False
    shuffle_rows: int = 256
    lanes: int | None = None
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.format in FORMATS, "format", self.format, ", ".join(FORMATS))
        ways = ("document", "paragraph", "line")
        _require(self.sample_by in ways, "sample_by", self.sample_by, ", ".join(ways))
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "numbers between 0 and 1")
        _require(self.val_tokens is None or self.val_tokens >= 2, "val_tokens", self.val_tokens, "null or at least 2")
        _require(self.shuffle_rows >= 1, "shuffle_rows", self.shuffle_rows, "at least 1")
        good = self.lanes is None or (isinstance(self.lanes, int) and self.lanes >= 1)
        _require(good, "lanes", self.lanes, "null or a whole number of at least 1")
        for name, domain in self.domains.items():
            weight = domain.get("weight")
            good = isinstance(weight, int | float) and weight > 0
            _require(good, f"domains.{name}.weight", weight, "numbers above 0")
            _require("domains" not in domain, f"domains.{name}.domains", "...", "no domains within domains")
        _require(
            not (self.streaming and self.val_tokens is None),
            "val_tokens",
            self.val_tokens,
            "a number when data.streaming is true: held-out text is then read before training starts",
        )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DataConfig:
        """From a Hydra group or a dictionary; unknown fields are a ValueError."""
        known = [one.name for one in fields(cls)]
        given = {str(key): config[key] for key in config}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"data.{unknown[0]} is no field of a data group; allowed are {', '.join(known)}")
        if not given.get("path"):
            raise ValueError("data.path is missing: give a file, a folder, a glob, a hub id or sample:NAME")
        given |= {"val_files": tuple(given.get("val_files") or ()), "domains": given.get("domains") or {}}
        return cls(**{**given, "path": str(given["path"])})

    @property
    def weights(self) -> dict[str, float]:
        """The share of each domain in the rows, not yet divided by their sum."""
        return {name: domain["weight"] for name, domain in self.domains.items()}

    def of_domain(self, name: str) -> DataConfig:
        """The group that a domain would be by itself."""
        own = {key: value for key, value in self.domains[name].items() if key != "weight"}
        common = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "domains"}
        try:
            return DataConfig.read(common | own)
        except ValueError as error:
            raise ValueError(f"data.domains.{name}: {error}") from None


def _require(good: bool, name: str, came: object, allowed: str) -> None:
    if not good:
        raise ValueError(f"data.{name} is {came!r}; allowed: {allowed}")
