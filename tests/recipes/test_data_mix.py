"""Text of several domains: rows in the proportions of the weights, resumable anywhere, judged by domain."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from recipes.data import TextDataModule
from recipes.data_config import DataConfig
from recipes.evaluate import evaluate
from tests.recipes.test_evaluate import tiny
from tests.support.text import EOS, caches, documents, word_tokenizer, write_corpus  # noqa: F401

SIZES = {"plays": [9, 30, 16, 20], "code": [40, 7, 3, 18, 50]}
WEIGHTS = {"plays": 1, "code": 3}


def mixed(tmp_path, **changes):
    """Two domains of different words, in folders of their own; and the words of each."""
    words, domains = {}, {}
    for name, lengths in SIZES.items():
        texts = [text.replace("d", name) for text in documents(lengths)]
        held_out = [f"{name}held{n} {name}out{n} {name}end{n}" for n in range(4)]
        write_corpus(tmp_path / name, texts)
        write_corpus(tmp_path / f"{name}_held_out", held_out)
        domains[name] = {"weight": WEIGHTS[name], "path": str(tmp_path / name)}
        domains[name]["val_path"] = str(tmp_path / f"{name}_held_out")
        words[name] = " ".join([*texts, *held_out]).split()
    tokenizer = word_tokenizer(words["plays"] + words["code"])
    ids = {name: set(tokenizer.convert_tokens_to_ids(words[name])) for name in words}
    fields = {"seq_len": 8, "batch_size": 4} | changes
    data = {"path": str(tmp_path), "domains": domains}
    return TextDataModule(data, tokenizer, **fields), ids


def domain_of(row, ids):
    """The domain that a row's tokens are of: of one and no other."""
    seen = set(row) - {EOS}
    if not seen:
        return "end"  # of a document, alone in its row
    found = [name for name, known in ids.items() if seen <= known]
    assert len(found) == 1
    return found[0]


def rows_of(batch, ids, seq_len=8):
    """The domains of a batch's rows; pieces of one domain stand together within a row."""
    names = []
    bounds = batch["cu_seqlens"].tolist()
    for start, end in pairwise(bounds):
        names.append((domain_of(batch["input_ids"][0, start:end].tolist(), ids), end - start))
    return names


def test_domains_give_rows_in_the_proportion_of_their_weights_over_many_epochs(caches, tmp_path):  # noqa: F811
    data, ids = mixed(tmp_path)
    loader = data.train_loader()
    tokens = dict.fromkeys(SIZES, 0)
    for number, batch in enumerate(islice(loader, 40), start=1):
        for name, length in rows_of(batch, ids):
            tokens[name] = tokens.get(name, 0) + length
        assert loader.given == {"plays": number, "code": 3 * number}  # of four rows one and three
    assert tokens["code"] / tokens["plays"] == pytest.approx(3, rel=0.1)  # an epoch's last row may be shorter


def test_a_domain_gives_every_token_once_before_it_begins_again(caches, tmp_path):  # noqa: F811
    data, ids = mixed(tmp_path, batch_size=1)
    plays = sum(length + 1 for length in SIZES["plays"])
    seen = []
    for batch in data.train_loader():
        row = batch["input_ids"][0].tolist()
        if domain_of(row, ids) == "plays":
            seen += row
        if len(seen) >= plays:
            break
    assert len(seen) == plays and len(set(seen) - {EOS}) == plays - len(SIZES["plays"])


@pytest.mark.parametrize("before, after", [(1, 1), (1, 2), (2, 1)])
def test_a_resume_goes_on_at_the_next_row_on_any_number_of_ranks(caches, tmp_path, before, after):  # noqa: F811
    def given(world_size, batches, states):
        """Every rank's batches; of all ranks together the rows in order."""
        data, _ = mixed(tmp_path, batch_size=4 // world_size)
        loaders = [data.train_loader(rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in loaders:
            if states:
                loader.load_state_dict(states)
        steps = list(zip(*(islice(loader, batches) for loader in loaders), strict=True))
        rows = [sorted(token for batch in step for token in batch["input_ids"][0].tolist()) for step in steps]
        assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
        return rows, loaders[0].state_dict()

    whole, _ = given(1, 12, None)
    first, state = given(before, 5, None)
    second, _ = given(after, 7, state)
    assert first + second == whole


def test_a_state_of_other_weights_is_refused(caches, tmp_path):  # noqa: F811
    data, _ = mixed(tmp_path)
    state = data.train_loader().state_dict()
    data.config.domains["code"]["weight"] = 4
    with pytest.raises(ValueError, match="weights"):
        data.train_loader().load_state_dict(state)


def test_held_out_text_is_judged_by_domain(caches, tmp_path):  # noqa: F811
    data, ids = mixed(tmp_path)
    domains = data.val_domains()
    assert list(domains) == list(SIZES)
    for name, batches in domains.items():
        assert {one for batch in batches for one, _ in rows_of(batch, ids)} == {name}
    assert sum(batch["input_ids"].numel() for batch in data.val_batches()) == 2 * 4 * 4
    words = len(data.tokenizer)
    found = evaluate(tiny(vocab_size=words), domains, name="tiny", speed=False, device="cpu")
    assert set(found.domains) == set(SIZES)
    assert found.cross_entropy == pytest.approx(sum(one["cross_entropy"] for one in found.domains.values()) / 2)


@pytest.mark.parametrize(
    "domain, message",
    [
        ({"path": "x"}, "data.domains.a.weight is None"),
        ({"path": "x", "weight": 0}, "data.domains.a.weight is 0"),
        ({"path": "x", "weight": 1, "colunm": "text"}, "data.domains.a: data.colunm is no field"),
        ({"path": "x", "weight": 1, "domains": {}}, "no domains within domains"),
    ],
)
def test_a_wrong_domain_is_named(domain, message):
    with pytest.raises(ValueError, match=message):
        config = DataConfig.read({"path": "corpus", "domains": {"a": domain}})
        config.of_domain("a")
