"""Evaluation: the same numbers as the slow and obvious way, whatever the batches."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from recipes.data import TextDataModule
from recipes.evaluate import evaluate
from recipes.evaluate_decode import decode_speed
from recipes.packed import forward_packed, pack
from recipes.scores import score
from tests.support.text import caches, documents, word_tokenizer, write_corpus  # noqa: F401

LENGTHS = [5, 1, 40, 13, 7, 29, 3, 3, 64, 2, 11]
VOCABULARY = sum(LENGTHS) + 1


def tiny(implementation="sdpa", kv_heads=2, cls=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    if implementation == "attnzoo":
        pytest.importorskip("attnzoo.hf")
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 128} | changes
    return cls(config(**fields, attn_implementation=implementation, tie_word_embeddings=True)).eval()


def held_out(tmp_path, batch_size=2, seq_len=16):
    texts = documents(LENGTHS)
    path = write_corpus(tmp_path / "corpus", texts)
    tokenizer = word_tokenizer(" ".join(texts).split())
    config = {"path": str(path), "val_fraction": 0.7}
    return TextDataModule(config, tokenizer, seq_len=seq_len, batch_size=batch_size).val_batches()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attnzoo"])
def test_it_equals_a_loop_over_pieces_in_fp64(caches, tmp_path, implementation):  # noqa: F811
    batches = held_out(tmp_path)
    model = tiny(implementation).double()
    loss, right, tokens = 0.0, 0, 0
    plain = tiny("eager").double()
    for batch in batches:
        starts = batch["cu_seqlens"].tolist()
        for start, end in pairwise(starts):
            ids = batch["input_ids"][0, start:end]
            with torch.no_grad():
                logits = plain(ids[None]).logits[0]
            for place in range(len(ids) - 1):
                loss -= logits[place].log_softmax(-1)[ids[place + 1]].item()
                right += int(logits[place].argmax() == ids[place + 1])
                tokens += 1
    found = evaluate(model, batches, name="tiny", speed=False, prompt_tokens=8, device="cpu")
    assert found.tokens == tokens > 50
    assert found.cross_entropy == pytest.approx(loss / tokens, rel=1e-9)
    assert found.accuracy == right / tokens
    assert found.perplexity == pytest.approx(2.718281828459045**found.cross_entropy)
    assert list(found.domains) == ["text"] and found.domains["text"]["tokens"] == tokens


def test_tokens_are_counted_by_how_many_stood_before_them_in_their_document():
    torch.manual_seed(0)
    model = tiny("eager", max_position_embeddings=256).double()
    lengths = (1, 2, 64, 65, 66, 130)
    pieces = [torch.randint(0, VOCABULARY, (n,)).numpy() for n in lengths]
    sums = {"1-63": [], "64-127": [], "128-255": []}
    for ids in map(torch.from_numpy, pieces):
        with torch.no_grad():
            logits = model(ids[None]).logits[0].log_softmax(-1)
        for before in range(1, len(ids)):
            name = "1-63" if before < 64 else "64-127" if before < 128 else "128-255"
            sums[name].append(-logits[before - 1, ids[before]].item())
    found = score(model, [pack(pieces[:2]), pack(pieces[2:])], "cpu").by_context()
    assert {f"{row['first']}-{row['last']}": row["tokens"] for row in found} == {k: len(v) for k, v in sums.items()}
    for row, losses in zip(found, sums.values(), strict=True):
        assert row["cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_samples_are_the_most_likely_tokens_and_no_document_end_is_passed(caches, tmp_path):  # noqa: F811
    texts = documents(LENGTHS)
    tokenizer = word_tokenizer(" ".join(texts).split())
    model = tiny()
    batches = [pack([torch.arange(1, 20).numpy()])]
    found = evaluate(
        model, batches, name="", speed=False, tokenizer=tokenizer, prompts=["d2w0 d2w1"], sample_tokens=5, device="cpu"
    )
    ids = tokenizer("d2w0 d2w1")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert found.samples == {"d2w0 d2w1": tokenizer.decode(ids[2:], skip_special_tokens=True)}


def test_perplexity_does_not_depend_on_the_batch_size(caches, tmp_path):  # noqa: F811
    model = tiny()
    found = [evaluate(model, held_out(tmp_path, n), name="", speed=False, device="cpu") for n in (1, 3, 100)]
    assert len({one.tokens for one in found}) == 1
    assert max(one.cross_entropy for one in found) == pytest.approx(min(one.cross_entropy for one in found), rel=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attnzoo"])
def test_a_document_does_not_see_the_ones_before_it(implementation):
    model = tiny(implementation)
    with torch.no_grad():
        alone, after = (
            forward_packed(model, pack([*before, torch.arange(1, 8).numpy()]))[0, -7:]
            for before in ([], [torch.arange(20, 33).numpy(), torch.arange(3, 4).numpy()])
        )
    torch.testing.assert_close(alone, after, rtol=1e-5, atol=1e-5)


def test_the_cache_is_measured_and_not_assumed():
    batches = [pack([torch.arange(1, 20).numpy()])]
    measure = lambda model: evaluate(model, batches, name="", speed=False, prompt_tokens=33, device="cpu")  # noqa: E731
    one_token = 2 * 2 * 8 * 4  # layers, k and v, head_dim, bytes
    assert [measure(tiny(kv_heads=n)).kv_bytes_per_token for n in (4, 2, 1)] == [n * one_token for n in (4, 2, 1)]
    assert measure(tiny().bfloat16()).kv_bytes_per_token == one_token
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(tiny()).kv_bytes_per_token == 2 * one_token  # of the model's own dtype
    window = tiny(kv_heads=1, cls=MistralForCausalLM, config=MistralConfig, sliding_window=9)
    assert measure(window).kv_bytes_per_token == one_token * 7 / 32  # eight keys are kept, the first was there before


def test_parameters_that_are_tied_count_once_and_the_mode_stays(caches, tmp_path):  # noqa: F811
    model = tiny(attention_dropout=0.5)
    model.train()
    batches = held_out(tmp_path)
    first, second = (evaluate(model, batches, name="", speed=False, device="cpu") for _ in range(2))
    assert first == second and model.training  # dropout was off
    untied = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": False}))
    assert first.parameters == sum(p.numel() for p in untied.parameters()) - VOCABULARY * 32


def test_speed_is_measured_when_asked_for():
    found = evaluate(tiny(), [pack([torch.arange(1, 20).numpy()])], name="", device="cpu")
    assert found.prefill_tokens_per_s > 0 and found.decode_tokens_per_s > 0


def test_decoding_many_sequences_is_measured_with_caches_that_the_positions_allow():
    batches = [pack([torch.arange(1, 20).numpy()])]
    model = tiny("attnzoo")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = evaluate(model, batches, name="", speed=False, decode={"batch": 3, "length": 4096}, device="cpu")
    assert found.batch_decode_tokens_per_s > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match=r"needs model\.attn_implementation=attnzoo"):
        decode_speed(tiny("sdpa"), batch=1, length=8)


def test_low_precision_logits_are_scored_in_fp32():
    batches = [pack([torch.arange(1, 100).numpy()])]
    half, full = (evaluate(m, batches, name="", speed=False, device="cpu") for m in (tiny().bfloat16(), tiny()))
    assert half.cross_entropy == pytest.approx(full.cross_entropy, rel=2e-3)
    assert half.cross_entropy != torch.tensor(half.cross_entropy).bfloat16().item()


def test_nothing_to_predict_and_weights_that_are_not_finite_are_errors():
    single = [pack([torch.arange(1, 2).numpy()]), pack([])]
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(tiny(), single, name="", speed=False, device="cpu")
    broken = tiny()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="broken: the cross-entropy is nan"):
        evaluate(broken, [pack([torch.arange(1, 9).numpy()])], name="broken", speed=False, device="cpu")


def test_the_command_judges_folders_side_by_side(caches, tmp_path, monkeypatch, capsys):  # noqa: F811
    from recipes.evaluate import main

    texts = documents(LENGTHS)
    path = write_corpus(tmp_path / "corpus", texts)
    for name, heads in (("whole", 2), ("single", 1)):
        tiny(kv_heads=heads).save_pretrained(tmp_path / name)
        word_tokenizer(" ".join(texts).split()).save_pretrained(tmp_path / name)
    overrides = [f"model.path={tmp_path / 'whole'}", f"also=[{tmp_path / 'single'}]", f"data.path={path}"]
    overrides += ["model.attn_implementation=sdpa", "seq_len=16", "data.val_fraction=0.5", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *overrides, f"hydra.run.dir={tmp_path / 'run'}"])
    main()
    printed = capsys.readouterr().out
    assert "whole" in printed and "single" in printed and "perplexity" in printed
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    assert [row["name"] for row in rows] == ["whole", "single"]
    assert rows[0]["kv_bytes_per_token"] == 2 * rows[1]["kv_bytes_per_token"]
    assert rows[0]["tokens"] == rows[1]["tokens"] > 0 and rows[0]["decode_tokens_per_s"] > 0


def test_a_command_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    from recipes.evaluate import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["evaluate", "model.path=/no/such/model", "model.attn_implementation=sdpa"])
    with pytest.raises(ValueError, match="there is no such folder"):
        main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config, message",
    [({"dtype": "int8"}, "model.dtype is 'int8'"), ({"path": "/no/such/model"}, "no such folder"), ({}, "config.json")],
)
def test_a_model_that_cannot_be_loaded_is_a_clear_error(tmp_path, config, message):
    from recipes.models import load_model

    fields = {"path": str(tmp_path), "dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": False}
    with pytest.raises(ValueError, match=message):
        load_model(fields | config)
