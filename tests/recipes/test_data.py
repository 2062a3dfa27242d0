"""The training and held-out text: complete, kept apart, shuffled, shared out and resumed."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

import recipes.data_stream
from recipes import parallel
from recipes.data import TextDataModule
from recipes.data_rows import epoch_order
from tests.support.text import EOS, caches, documents, word_tokenizer, write_corpus  # noqa: F401

pytestmark = pytest.mark.usefixtures("caches")

LENGTHS = [5, 1, 40, 13, 0, 7, 29, 3, 3, 64, 2, 11]


def module(tmp_path, texts, *, kind="text", words=None, seq_len=8, batch_size=2, seed=0, **config):
    path = write_corpus(tmp_path / "corpus", texts, kind)  # anew, but the same content is the same data
    tokenizer = word_tokenizer(words or " ".join(texts).split())
    config = {"path": str(path), "val_tokens": 1000 if config.get("streaming") else None, **config}
    return TextDataModule(config, tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed)


def pieces(batches):
    """The pieces of all batches, as tuples of token ids, after checking how each batch is laid out."""
    for batch in batches:
        ids, boundaries = batch["input_ids"][0], batch["cu_seqlens"]
        assert boundaries.dtype == torch.int32 and boundaries[0] == 0 and boundaries[-1] == len(ids)
        expected = ids.clone()
        expected[boundaries[:-1].long()] = -100
        assert torch.equal(batch["labels"][0], expected)
        for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
            assert end > start
            assert torch.equal(batch["position_ids"][0, start:end], torch.arange(end - start))
            yield tuple(ids[start:end].tolist())


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("seq_len, batch_size", [(8, 2), (7, 3), (200, 1)])
def test_every_token_comes_once_an_epoch_and_no_piece_mixes_documents(tmp_path, kind, seq_len, batch_size):
    data = module(tmp_path, documents(LENGTHS), kind=kind, seq_len=seq_len, batch_size=batch_size, val_fraction=0.1)
    held_out = Counter(token for piece in pieces(data.val_batches()) for token in piece)
    words = {token: word for word, token in data.tokenizer.get_vocab().items()}
    loader = data.train_loader()
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert {batch["input_ids"].numel() for batch in batches[:-1]} <= {seq_len * batch_size}
        seen = Counter()
        for piece in pieces(batches):
            assert len(piece) <= seq_len
            *start, last = [words[token] for token in piece]
            numbers = [tuple(map(int, word[1:].split("w"))) for word in (start if last == "<eos>" else [*start, last])]
            assert all(b == (a[0], a[1] + 1) for a, b in pairwise(numbers))
            seen.update(piece)
        assert data.tokens_per_epoch == seen.total()
        everything = seen + held_out
        assert everything.pop(EOS) == sum(map(bool, LENGTHS))
        assert set(everything.values()) == {1} and len(everything) == len(words) - 1


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resume_gives_the_batches_that_no_interruption_would_have_given(tmp_path, kind, streaming):
    data = module(tmp_path, documents(LENGTHS), kind=kind, streaming=streaming, shuffle_rows=5, val_fraction=0.2)

    def batches(loader):
        while True:
            yield from loader

    whole = list(islice(batches(data.train_loader()), 40))
    assert len({batch["input_ids"].sum().item() for batch in whole}) > 5
    for stop in range(0, 33, 3):
        first = data.train_loader()
        assert same(list(islice(batches(first), stop)), whole[:stop])
        again = data.train_loader()
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert same(list(islice(batches(again), 7)), whole[stop : stop + 7])


def test_a_stream_gives_each_token_once_before_it_starts_again(tmp_path):
    data = module(tmp_path, documents(LENGTHS), streaming=True, shuffle_rows=4, batch_size=1, val_fraction=0.2)
    held_out = Counter(token for piece in pieces(data.val_batches()) for token in piece)
    rows = math.ceil((sum(LENGTHS) + sum(map(bool, LENGTHS)) - held_out.total()) / 8)
    loader = iter(data.train_loader())
    for _ in range(2):
        seen = Counter(token for piece in pieces(islice(loader, rows)) for token in piece)
        everything = seen + held_out
        assert everything.pop(EOS) == sum(map(bool, LENGTHS))
        assert set(everything.values()) == {1} and len(everything) == sum(LENGTHS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_batches_of_one_process(tmp_path, streaming, world_size):
    data = module(tmp_path, documents(LENGTHS), streaming=streaming, batch_size=2, val_fraction=0.2)
    lanes = {"lanes": world_size} if streaming else {}
    one = module(
        tmp_path, documents(LENGTHS), streaming=streaming, batch_size=2 * world_size, val_fraction=0.2, **lanes
    )
    ranks = [list(islice(data.train_loader(rank=r, world_size=world_size), 12)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for index, together in enumerate(islice(one.train_loader(), 12)):
        shares = Counter(piece for batches in ranks for piece in pieces([batches[index]]))
        shares.pop((EOS,), None)  # a rank without a row gets one token that trains nothing
        expected = Counter(pieces([together]))
        expected.pop((EOS,), None)
        assert shares == expected


def streams(tmp_path, world_size, **config):
    """The loaders of all processes."""
    data = module(tmp_path, documents([9] * 40), streaming=True, shuffle_rows=3, batch_size=1, **config)
    return [data.train_loader(rank=rank, world_size=world_size) for rank in range(world_size)]


def together(loaders, batches, monkeypatch):
    """The next batches of all processes, their pieces in the order in which one process would give them; the state."""
    given = [list(islice(loader, batches)) for loader in loaders]
    states = [{number: lane.state_dict() for number, lane in loader.lanes.items()} for loader in loaders]
    monkeypatch.setattr(parallel, "gather", lambda _: states)
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    return [[*pieces([batch])] for row in zip(*given, strict=True) for batch in row], loaders[0].state_dict()


@pytest.mark.parametrize("kind", ["text", "jsonl"])  # many files, which are shared out, and one, whose lines are
def test_a_stream_goes_on_with_any_number_of_processes_that_shares_out_its_lanes(tmp_path, monkeypatch, kind):
    whole, _ = together(streams(tmp_path, 1, lanes=4, kind=kind), 60, monkeypatch)
    rows, state = together(streams(tmp_path, 4, kind=kind), 3, monkeypatch)
    for world_size, batches in ((2, 7), (1, 10), (4, 4), (2, 4)):
        loaders = streams(tmp_path, world_size, kind=kind)
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        more, state = together(loaders, batches, monkeypatch)
        rows += more
    assert len(rows) == 60 and rows == whole
    with pytest.raises(ValueError, match="4 lanes, which 3 processes cannot share out evenly"):
        streams(tmp_path, 3, kind=kind)[0].load_state_dict(state)


def test_a_process_tokenises_its_own_share_of_a_stream_alone(tmp_path, monkeypatch):
    encoded, encode = [[], []], recipes.data_stream.encode
    for rank, loader in enumerate(streams(tmp_path, 2)):
        kept = encoded[rank]
        monkeypatch.setattr(
            recipes.data_stream, "encode", lambda texts, *a, kept=kept, **k: encode(map(_noted(kept), texts), *a, **k)
        )
        list(islice(loader, 18))
    first, second = (set(kept) for kept in encoded)
    assert 15 < len(first) <= 20 and 15 < len(second) <= 20 and not first & second


def _noted(kept):
    def note(text):
        kept.append(text)
        return text

    return note


def test_four_batches_of_one_row_are_one_batch_of_four(tmp_path):
    ones = module(tmp_path, documents(LENGTHS), batch_size=1).train_loader()
    fours = module(tmp_path, documents(LENGTHS), batch_size=4).train_loader()
    assert list(pieces(islice(ones, 16))) == list(pieces(islice(fours, 4)))


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    orders = [
        [tuple(pieces(module(tmp_path, documents(LENGTHS), seed=seed).train_loader())) for _ in range(2)]
        for seed in (0, 1)
    ]
    assert orders[0][0] == orders[0][1] != orders[1][0]
    assert not np.array_equal(epoch_order(50, 0, 0), epoch_order(50, 0, 1))
    assert not np.array_equal(epoch_order(50, 1, 0), epoch_order(50, 0, 1))
    for count in (0, 1, 2, 50):
        order = epoch_order(count, 3, 1)
        assert sorted(order) == list(range(count)) and list(order[-1:]) == list(range(count))[-1:]


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 9}, {"text": "other words"}])
def test_a_state_of_other_data_is_refused_with_what_differs(tmp_path, change):
    texts = documents(LENGTHS)
    state = module(tmp_path, texts).train_loader().state_dict()
    text = change.pop("text", None)
    other = module(tmp_path / "other", [text, *texts], **change) if text else module(tmp_path, texts, **change)
    with pytest.raises(ValueError, match=next(iter(change), "data") + r": .* then, .* now"):
        other.train_loader().load_state_dict(state)


def test_lightning_saves_and_restores_the_place_in_the_middle_of_an_epoch(tmp_path):
    from lightning.pytorch import LightningModule, Trainer

    class Watching(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch):
            self.seen.append({key: value.clone() for key, value in batch.items()})
            return self.weight * 1.0

        def validation_step(self, batch):
            self.log("val", batch["input_ids"].float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps, resume=None):
        watching = Watching()
        data = module(tmp_path, documents(LENGTHS), val_fraction=0.2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, enable_checkpointing=False, limit_val_batches=1, **quiet
        )
        trainer.fit(watching, datamodule=data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return watching.seen

    whole = fit(20)
    for stop in (3, 11, 12):
        assert same(fit(stop) + fit(20, resume=tmp_path / f"{stop}.ckpt"), whole)
