"""The benchmark's own parts, where there is no GPU: what it counts, what it calls right, what it makes of its rows."""

from __future__ import annotations

import json

import pytest
import torch

from attnzoo import bench, cli, ops
from attnzoo.bench import gate, report, table
from attnzoo.bench.cases import Case, cases, flex_mask
from attnzoo.bench.contestants import Unavailable, draw, prepare
from attnzoo.masks import Causal, Full, SlidingWindow, big_bird
from attnzoo.ops.softmax.choice import LENGTHS, Class, nearest, read


def case(mask=Causal(), *, length=40, **options) -> Case:
    return Case("dense", "a case", 16, 6, 2, 1, length, mask, ("via:tiled",), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU would start timing")
def test_a_machine_without_a_gpu_is_told_so_in_one_line(capsys) -> None:
    assert cli.main(["bench", "attention"]) == 2
    assert capsys.readouterr().err == "attnzoo bench: needs a CUDA GPU, and there is none\n"


def test_arguments_that_are_not_understood_end_with_2(capsys) -> None:
    assert bench.main(["attention", "--suite", "fast"]) == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mask", "options", "pairs"),
    [
        (Full(), {}, 40 * 40),
        (Causal(), {}, 40 * 40 / 2),
        (Causal(), {"documents": 4}, 4 * 10 * 10 / 2),
        (SlidingWindow(8), {}, 40 * 8),
        (big_bird(4, length=40), {}, int(big_bird(4, length=40).dense(40, 40).sum())),
    ],
)
def test_flops_count_the_pairs_that_the_notes_count(mask, options, pairs) -> None:
    assert case(mask, **options).flops("cpu") == 4 * 6 * 16 * pairs


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"sinks": True}, {"documents": 4}, {"alibi": True}, {"mask": SlidingWindow(7)}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_the_gates_truth_is_that_of_the_reference_and_passes_a_right_kernel(options, monkeypatch) -> None:
    monkeypatch.setattr(gate, "CHUNK", 16)  # two whole chunks and a part
    one = case(**options)
    data = draw(one, "cpu")
    truth, plain = gate.one_head(one, data, torch.float32), gate.one_head(one, data, torch.bfloat16)
    exact = data._replace(**{n: getattr(data, n).detach().double().requires_grad_() for n in ("q", "k", "v")})
    exact = exact._replace(sinks=None if data.sinks is None else data.sinks.detach().double().requires_grad_())
    for who, inputs in (("via:reference", exact), ("via:tiled", data)):
        out = prepare(who, one, inputs)()
        grads = torch.autograd.grad(out, inputs.leaves, inputs.d_out.to(out.dtype))
        found = gate.same_head(one, {"out": out} | dict(zip(("dq", "dk", "dv", "dsinks"), grads, strict=False)))
        if who == "via:reference":
            assert found.keys() == truth.keys()
            for name, t in found.items():
                torch.testing.assert_close(t, truth[name], rtol=1e-4, atol=1e-4)
        else:
            assert gate.worst(found, plain, truth)[0] <= 1


@pytest.mark.parametrize("what", ["out", "dq", "dk", "dv"])
def test_the_gate_stops_a_kernel_that_is_wrong_in_one_place_or_not_finite(what) -> None:
    one = case()
    data = draw(one, "cpu")
    truth, plain = gate.one_head(one, data, torch.float32), gate.one_head(one, data, torch.bfloat16)
    for wrong in (torch.inf, truth[what].abs().max().item()):
        found = {name: t.clone() for name, t in truth.items()}
        found[what][..., -1, 3] += wrong
        ratio, where = gate.worst(found, plain, truth)
        assert ratio > 1 and where.startswith(what)
    assert gate.worst(truth, plain, truth)[0] == 0


def test_a_contestant_that_cannot_run_says_why() -> None:
    one = case(softcap=2.0)
    with pytest.raises(Unavailable, match="sdpa-cudnn: has no softcap"):
        prepare("via:sdpa-cudnn", one, draw(one, "cpu"))()


def test_every_case_has_a_name_of_its_own_and_ranks_in_a_known_class() -> None:
    suites = bench.SUITES
    every = cases(suites)
    assert len({(c.suite, c.name) for c in every}) == len(every) and {c.suite for c in every} == set(suites)
    assert {c.kind for c in every} == {"full", "causal", "window", "packed", "softcap", "sinks", "sparse"}


@pytest.mark.parametrize("one", [c for c in cases(bench.SUITES) if "peer:flex" in c.contestants], ids=lambda c: c.name)
def test_flex_attention_gets_the_same_mask(one) -> None:
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(one.length, (600,), generator=generator)
    far = torch.randint(one.length, (600,), generator=generator)
    near = (i - torch.randint(-700, 4200, (600,), generator=generator)).clamp(0, one.length - 1)
    flex = flex_mask(one, "cpu")
    for j in (far, near, i):
        want = torch.stack([one.mask.visible(a[None, None], b[None, None])[0, 0] for a, b in zip(i, j, strict=True)])
        assert torch.equal(flex(0, 0, i, j), want)


def rows(**times: dict[str, tuple[float, float | None]]) -> list[dict]:
    found = []
    for name, contestants in times.items():
        for contestant, (forward, backward) in contestants.items():
            row = {"suite": "dense", "case": name, "contestant": contestant, "kind": "causal", "dim": 128}
            row |= {"length": 4096, "grouped": True, "forward_ms": forward, "forward_tflops": 1 / forward}
            if backward is not None:
                row |= {"backward_ms": backward, "backward_tflops": 2.5 / backward}
            found.append(row | {"error_ratio": 0.5, "first_call_s": 0.1, "forward_memory": 1.0, "training_memory": 1.0})
    return found


def test_the_table_ranks_by_time_and_leaves_out_who_was_wrong_or_ran_a_part() -> None:
    measured = rows(
        a={"via:triton": (2.0, 3.0), "via:fa3-fwd": (1.0, None), "via:sdpa": (1.5, 9.0), "via:auto": (0.1, 0.1)},
        b={"via:triton": (2.0, 3.0), "via:fa3-fwd": (1.0, None), "via:sdpa": (1.5, 9.0), "via:sdpa-flash": (0.1, 0.1)},
        dropout={"via:triton": (0.1, 0.1)},
    )
    del measured[-2]["forward_ms"]  # was wrong in case b, and did not run in case a
    assert table.orders(measured) == {
        "forward causal d128 s4096 grouped": ["fa3-fwd", "sdpa", "triton"],
        "training causal d128 s4096 grouped": ["triton", "sdpa"],
    }


def test_the_written_table_is_what_the_choice_reads(tmp_path) -> None:
    about = dict.fromkeys(("capability", "torch", "cuda", "cudnn", "packages", "commit")) | {"device": "A GPU"}
    path = tmp_path / "times.json"
    path.write_text('{"Another": {"orders": {}}}')
    table.write(path, about, rows(a={"via:triton": (2.0, 3.0), "via:sdpa": (1.5, 9.0)}))
    other = [row | {"kind": "window"} for row in rows(a={"via:sdpa": (1.0, 1.0)})]
    table.write(path, about, other)  # keeps the classes of before
    tables = read(json.loads(path.read_text()))
    assert nearest(tables["A GPU"], Class(True, "window", 64, 256, False))[0] == ("sdpa",)
    assert set(tables) == {"A GPU", "Another"}
    order, source = nearest(tables["A GPU"], Class(True, "causal", 64, LENGTHS[-1], False))
    assert order == ("triton", "sdpa") and source == "training causal d128 s4096 grouped"
    assert nearest(tables["A GPU"], Class(True, "sinks", 128, 4096, True)) == ((), "")


def test_tables_and_plots_are_drawn_from_the_json_files_alone(tmp_path) -> None:
    result = {
        "device": "NVIDIA H200",
        "torch": "2",
        "cudnn": 9,
        "commit": "abc",
        "packages": {"triton": "3"},
        "limits": {"matmul_tflops": 800.0, "copy_gbs": 4000.0},
    }
    measured = rows(
        a={"via:triton": (2.0, 3.0), "peer:flex": (3.0, 3.0), "peer:sdpa": (4.0, 6.0), "via:auto": (2.0, 3.0)}
    )
    report.write(tmp_path / "attention_dense_h200.json", result | {"rows": measured})
    assert bench.main(["attention", "--draw", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "attention_h200.md").read_text()
    assert "| a | – / – | 1.50 / 1.00 | 1.50 / 1.00 | 1.50 / 1.00 | 2.00 / 2.00 |" in text
    assert (tmp_path / "attention_h200.png").stat().st_size > 10_000


def test_ops_are_what_the_contestants_call() -> None:
    one = case()
    data = draw(one, "cpu")
    want = ops.attention(*(t.transpose(1, 2) for t in data[:3]), mask=Causal(), backend="tiled").transpose(1, 2)
    assert torch.equal(prepare("via:tiled", one, data)(), want)
