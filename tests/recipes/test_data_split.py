"""Which text is held out, what is cached, and what is refused."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from transformers import ByT5Tokenizer

import recipes.data_tokens
from recipes.data import TextDataModule
from recipes.data_config import DataConfig
from recipes.data_tokens import tokenizer_digest
from tests.recipes.test_data import LENGTHS, module, pieces
from tests.support.text import EOS, caches, documents, word_tokenizer, write_corpus  # noqa: F401

pytestmark = pytest.mark.usefixtures("caches")


def tokens(batches):
    return {token for piece in pieces(batches) for token in piece} - {EOS}


def train_tokens(data):
    return tokens(islice(data.train_loader(), 60))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "config", [{"val_fraction": 0.3}, {"val_files": ["002.txt", "01*.txt"]}, {"val_path": "held_out"}]
)
def test_held_out_text_is_never_trained_on(tmp_path, streaming, config):
    texts = documents(LENGTHS)
    if "val_path" in config:
        config = {"val_path": str(write_corpus(tmp_path / "held_out", documents([9, 9])[1:]))}
    data = module(tmp_path, texts, streaming=streaming, words=" ".join(texts + documents([9, 9])).split(), **config)
    held_out, trained = tokens(data.val_batches()), train_tokens(data)
    assert held_out and trained
    if "val_path" not in config:
        assert not held_out & trained and len(held_out | trained) == sum(LENGTHS)
    if "val_files" in config:
        assert held_out == set(data.tokenizer(" ".join([texts[2], texts[10], texts[11]]))["input_ids"])


def test_equal_documents_are_on_one_side_of_the_split(tmp_path):
    data = module(tmp_path, documents(LENGTHS) * 3, val_fraction=0.3)
    assert not tokens(data.val_batches()) & train_tokens(data)


def test_the_split_does_not_depend_on_the_seed(tmp_path):
    texts = documents(LENGTHS)
    first, second = (list(pieces(module(tmp_path, texts, seed=seed).val_batches())) for seed in (0, 1))
    assert first == second


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    data = module(tmp_path, documents([100]), val_fraction=0.1)
    assert sorted(tokens(data.val_batches())) == list(range(92, 101))  # and the eos after them
    assert sorted(train_tokens(data)) == list(range(1, 92))


def test_names_that_the_corpus_does_not_know_leave_the_choice_to_the_fraction(tmp_path, caplog):
    data = module(tmp_path, documents(LENGTHS), val_files=["macbeth.txt"], val_fraction=0.2)
    assert tokens(data.val_batches()) and not tokens(data.val_batches()) & train_tokens(data)
    assert "none of data.val_files" in caplog.text


def test_a_limit_takes_rows_from_all_over_the_held_out_text(tmp_path):
    data = module(tmp_path, documents([10, 400]), val_files=["001.txt"], val_tokens=40)
    found = sorted(tokens(data.val_batches()))
    assert 32 <= len(found) <= 40 and found[0] < 50 and found[-1] > 300


def test_text_is_tokenised_once_for_each_tokenizer_and_each_content(tmp_path, monkeypatch):
    texts, encoded = documents(LENGTHS), []
    encode = recipes.data_tokens.encode
    monkeypatch.setattr(recipes.data_tokens, "encode", lambda *a: encoded.append(1) or encode(*a))
    path = write_corpus(tmp_path, texts, "jsonl")

    def setup(words, **settings):
        config = {"path": str(path), "val_fraction": 0.2}
        TextDataModule(config, word_tokenizer(words), batch_size=1, **settings).setup()

    words = " ".join(texts).split()
    setup(words, seq_len=8)
    setup(words, seq_len=5, seed=4)
    assert len(encoded) == 1
    setup(["more", *words], seq_len=8)
    assert len(encoded) == 2
    write_corpus(tmp_path, [*texts, texts[2]], "jsonl")
    setup(words, seq_len=8)
    assert len(encoded) == 3


def test_an_interrupted_tokenisation_leaves_nothing_and_can_be_repeated(caches, tmp_path, monkeypatch):  # noqa: F811
    def interrupted(*_):
        yield from ()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(recipes.data_tokens, "encode", interrupted)
        module(tmp_path, documents(LENGTHS)).setup()
    assert not [path for path in (caches / "attnzoo-cache" / "tokens").iterdir() if path.is_dir()]
    assert train_tokens(module(tmp_path, documents(LENGTHS)))


def test_a_tokenizer_in_python_has_a_digest_too():
    assert tokenizer_digest(ByT5Tokenizer()) == tokenizer_digest(ByT5Tokenizer())
    assert tokenizer_digest(ByT5Tokenizer()) != tokenizer_digest(ByT5Tokenizer(extra_ids=3))


def test_an_eos_that_the_tokenizer_sets_itself_is_not_doubled(tmp_path):
    path = write_corpus(tmp_path / "corpus", documents([3, 3]))
    data = TextDataModule({"path": str(path), "val_fraction": 0.5}, ByT5Tokenizer(), seq_len=64, batch_size=1)
    everything = [token for piece in [*pieces(data.train_loader()), *pieces(data.val_batches())] for token in piece]
    assert everything.count(ByT5Tokenizer().eos_token_id) == 2


def bad_corpora(folder: Path) -> dict[str, tuple[dict, str]]:
    write_corpus(folder / "good", documents(LENGTHS))
    write_corpus(folder / "blank", ["", "  \n "])
    write_corpus(folder / "empty", [])
    write_corpus(folder / "lines", documents(LENGTHS), "jsonl", column="body")
    (folder / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "zero.txt").write_text("")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("a")
    (folder / "mixed" / "a.jsonl").write_text('{"text": "a"}\n')
    good = str(folder / "good")
    return {
        "missing file": ({"path": str(folder / "none.txt")}, "data.path .* no such file or folder"),
        "missing folder": ({"path": str(folder / "none")}, "data.path .* no such file or folder"),
        "empty glob": ({"path": str(folder / "*.md")}, "data.path .* no such file or folder"),
        "no path": ({"path": None}, "data.path is missing"),
        "unknown sample": ({"path": "sample:goethe"}, "'goethe'; allowed are bible, corpus, shakespeare, smollm2"),
        "blank texts": ({"path": str(folder / "blank")}, "holds no text"),
        "no text file": ({"path": str(folder / "empty")}, "holds no .txt"),
        "empty file": ({"path": str(folder / "zero.txt")}, "is empty"),
        "two formats": ({"path": str(folder / "mixed")}, "both jsonl and text"),
        "missing column": ({"path": str(folder / "lines")}, "data.column is 'text'; the data has body"),
        "not text": ({"path": str(folder / "numbers.jsonl")}, "holds int, not text"),
        "broken JSON": ({"path": str(folder / "broken.jsonl")}, "could not be read as jsonl"),
        "unknown field": ({"path": good, "colum": "a"}, "data.colum is no field .* column"),
        "unknown format": ({"path": good, "format": "csv"}, "data.format is 'csv'"),
        "fraction": ({"path": good, "val_fraction": 1.5}, "data.val_fraction is 1.5"),
        "all held out by name": ({"path": good, "val_files": ["*"]}, "leaves no file"),
        "all held out by fraction": ({"path": good, "val_fraction": 1 - 1e-9}, "holds out all 11"),
        "one name unknown": ({"path": good, "val_files": ["001.txt", "x.txt"]}, "has 'x.txt'"),
        "held out is trained on": ({"path": good, "val_path": good + "/001.txt"}, "shares .*001.txt"),
        "stream without limit": ({"path": good, "streaming": True, "val_tokens": None}, "data.val_tokens"),
    }


CASES = [
    *("missing file", "missing folder", "empty glob", "no path", "unknown sample", "blank texts", "no text file"),
    *("empty file", "two formats", "missing column", "not text", "broken JSON", "unknown field", "unknown format"),
    *("fraction", "all held out by name", "all held out by fraction", "one name unknown", "held out is trained on"),
    "stream without limit",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_a_clear_error(tmp_path, case):
    config, message = bad_corpora(tmp_path)[case]
    tokenizer = word_tokenizer(" ".join(documents(LENGTHS)).split())
    with pytest.raises(ValueError) as caught:
        TextDataModule(config, tokenizer, seq_len=8, batch_size=1).setup()
    assert re.search(message, str(caught.value)), caught.value


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    tokenizer = word_tokenizer(["a", "b", "c"])
    with pytest.raises(ValueError, match="ids up to 3, but the model's embedding has 3 rows"):
        TextDataModule({"path": "x"}, tokenizer, seq_len=8, batch_size=1, vocab_size=3)
    TextDataModule({"path": "x"}, tokenizer, seq_len=8, batch_size=1, vocab_size=4)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        TextDataModule({"path": "x"}, tokenizer, seq_len=8, batch_size=1)


@pytest.mark.parametrize("group", ["shakespeare", "text", "jsonl", "parquet", "hub"])
def test_every_data_group_composes_to_a_data_config(group):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("evaluate", overrides=[f"data={group}", "data.path=somewhere", "data.val_tokens=7"])
    read = DataConfig.read(config.data)
    assert (read.path, read.val_tokens, read.streaming) == ("somewhere", 7, group == "hub")
