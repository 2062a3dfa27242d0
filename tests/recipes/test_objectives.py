"""What is minimised: terms, their weights, and what the teacher has to do with it."""

import pytest
import torch
import torch.nn.functional as F

import attnzoo
from attnzoo import GQA, MLA, Linear
from recipes.models import load_model
from recipes.objectives import Objective, next_token, read_terms
from recipes.objectives.layers import LayerErrors
from recipes.packed import forward_packed, pack, shifted_labels
from recipes.teacher import Teacher
from recipes.teacher_store import TeacherStore, fill
from tests.support.tiny_llama import save_tiny_llama

PIECES = [torch.arange(2, 25).numpy(), torch.arange(30, 44).numpy(), torch.arange(3, 60, 5).numpy()]
BATCH = pack(PIECES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def load(folder, implementation="attnzoo"):
    config = {"path": str(folder), "dtype": "float32", "trust_remote_code": False}
    return load_model({**config, "attn_implementation": implementation})


def student_of(folder, spec=None):
    return attnzoo.convert(load(folder), spec or GQA(num_kv_heads=1)).train()


def objective(terms, student, teacher):
    """With what the terms need; the layers' powers are measured on BATCH."""
    layers = None
    if "layers" in terms:
        layers = LayerErrors(student, teacher)
        layers.measure(teacher, [BATCH])
    return Objective(read_terms(terms), teacher=teacher, layers=layers)


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("implementation", ["attnzoo", "sdpa"])
def test_kl_is_that_of_torch_and_so_is_its_gradient(folder, implementation):
    student, teacher = student_of(folder), Teacher(load(folder, implementation))
    terms = {"ce": {"weight": 0.25}, "kl": {"weight": 2.0, "temperature": 1.5}}
    loss = objective(terms, student, teacher)(student, BATCH)
    loss.total.backward()
    ours = gradients(student)

    targets = shifted_labels(BATCH)
    counted = targets != -100
    logits = forward_packed(student, BATCH)[0][counted]
    with torch.no_grad():
        soft = (forward_packed(teacher.model, BATCH)[0][counted] / 1.5).softmax(-1)
    kl = 1.5**2 * F.kl_div((logits / 1.5).log_softmax(-1), soft, reduction="sum")
    ce = F.cross_entropy(logits, targets[counted], reduction="sum")
    (0.25 * ce + 2.0 * kl).backward()
    torch.testing.assert_close(loss.terms["kl"], kl.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.terms["ce"], ce.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.total, 0.25 * ce + 2.0 * kl, atol=1e-3, rtol=1e-5)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_the_teacher_gets_no_gradient_and_stands_in_no_state_dict(folder):
    student, teacher = student_of(folder), Teacher(load(folder))
    made = objective({"kl": {}, "layers": {}}, student, teacher)
    made(student, BATCH).total.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.model.parameters())
    module = torch.nn.Module()
    module.objective = made
    assert not list(module.parameters())


def test_weights_go_in_a_line_from_the_first_step_of_a_stage_to_its_last(folder):
    student, teacher = student_of(folder), Teacher(load(folder))
    made = objective(
        {"ce": {"weight": {"from": 0.0, "to": 1.0}}, "kl": {"weight": {"from": 2, "to": 1}}}, student, teacher
    )
    for progress, weights in ((0.0, (0.0, 2.0)), (0.5, (0.5, 1.5)), (1.0, (1.0, 1.0))):
        loss = made(student, BATCH, progress)
        expected = weights[0] * loss.terms["ce"] + weights[1] * loss.terms["kl"]
        torch.testing.assert_close(loss.total.detach(), expected)


@pytest.mark.parametrize("inputs", ["teacher", "own"])
def test_layers_of_an_unconverted_student_have_no_error(folder, inputs):
    student, teacher = load(folder).train(), Teacher(load(folder))
    loss = objective({"layers": {"inputs": inputs}}, student, teacher)(student, BATCH)
    assert float(loss.terms["layers"]) == 0


def test_an_error_as_large_as_the_output_costs_1_a_token_in_every_layer(folder):
    student, teacher = student_of(folder), Teacher(load(folder))
    for layer in student.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    loss = objective({"layers": {}}, student, teacher)(student, BATCH)
    with torch.no_grad():
        seen = teacher.look(BATCH, layers=True).outputs
    counted = shifted_labels(BATCH) != -100
    expected = sum(out[0][counted].square().sum() / out[0].square().sum() * len(out[0]) for out in seen.values()) / 2
    torch.testing.assert_close(loss.terms["layers"], expected)
    assert float(expected) == pytest.approx(int(counted.sum()), rel=0.1)


def test_layers_that_get_the_teachers_inputs_learn_alone(folder):
    """The error of a layer depends on no other layer, on no MLP, and on neither embeddings nor head."""
    student, teacher = student_of(folder), Teacher(load(folder))
    made = objective({"layers": {}}, student, teacher)
    before = made(student, BATCH)
    before.total.backward()
    assert all((gradient is not None) == (".self_attn." in name) for name, gradient in gradients(student).items())
    for name, parameter in student.named_parameters():
        if ".self_attn." not in name:
            parameter.data.mul_(1.5)
    torch.testing.assert_close(made(student, BATCH).total, before.total)
    assert not any("forward" in vars(module) for module in student.modules())


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        (GQA(num_kv_heads=1), [0, 1]),
        (MLA(), [0, 1]),
        ([Linear(feature_map="hedgehog", window=4), GQA()], [0]),
        ([GQA(), GQA(mask=attnzoo.masks.SlidingWindow(4))], [1]),
    ],
)
def test_layers_of_every_mechanism_are_compared_where_they_were_changed(folder, spec, changed):
    student, teacher = student_of(folder, spec), Teacher(load(folder))
    made = objective({"layers": {}}, student, teacher)
    loss = made(student, BATCH)
    assert list(made.layers.numbers) == changed
    assert float(loss.terms["layers"]) > 0
    loss.total.backward()
    for number, layer in enumerate(student.model.layers):
        assert all((p.grad is not None) == (number in changed) for p in layer.self_attn.parameters())


@pytest.mark.parametrize(
    "terms",
    [{"ce": {}}, {"kl": {}}, {"layers": {}}, {"layers": {"inputs": "own"}}, {"ce": {}, "kl": {}, "layers": {}}],
    ids=str,
)
def test_a_batch_costs_what_its_pieces_cost(folder, terms):
    student, teacher = student_of(folder), Teacher(load(folder))
    made = objective(terms, student, teacher)
    whole, parts = made(student, BATCH), [made(student, pack([piece])) for piece in PIECES]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts), atol=1e-4, rtol=1e-5)
    for name, value in whole.terms.items():
        torch.testing.assert_close(value, sum(part.terms[name] for part in parts), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("inputs", ["teacher", "own"])
def test_layers_are_compared_alike_by_models_that_take_one_document_at_a_time(folder, inputs):
    losses = []
    for ours, theirs in (("attnzoo", "attnzoo"), ("sdpa", "attnzoo"), ("attnzoo", "sdpa")):
        student = attnzoo.convert(load(folder, ours), GQA(num_kv_heads=1)).train()
        made = objective({"layers": {"inputs": inputs}}, student, Teacher(load(folder, theirs)))
        losses.append(made(student, BATCH).total)
    torch.testing.assert_close(losses[1:], [losses[0]] * 2)


@pytest.mark.parametrize("inputs", ["teacher", "own"])
def test_gradient_checkpointing_changes_no_gradient(folder, inputs):
    student, teacher = student_of(folder), Teacher(load(folder))
    made = objective({"layers": {"inputs": inputs}, "kl": {}}, student, teacher)
    made(student, BATCH).total.backward()
    plain = gradients(student)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    made(student, BATCH).total.backward()
    torch.testing.assert_close(gradients(student), plain)
    assert student.is_gradient_checkpointing


def stored(folder, path, *, k, batches=(BATCH,), identity="a teacher"):
    store, teacher = TeacherStore(path, {"teacher": identity, "k": k}), Teacher(load(folder))
    fill(store, teacher, batches, k=k, temperature=1.5)
    return store


def test_stored_probabilities_of_the_whole_vocabulary_are_the_full_kl(folder, tmp_path):
    student, teacher = student_of(folder), Teacher(load(folder))
    full = objective({"kl": {"temperature": 1.5}}, student, teacher)(student, BATCH)
    full.total.backward()
    expected = gradients(student)
    made = Objective(read_terms({"kl_topk": {"temperature": 1.5, "k": 64}}))
    loss = made(student, stored(folder, tmp_path / "all", k=64).attach(BATCH))
    loss.total.backward()
    torch.testing.assert_close(loss.terms["kl_topk"], full.terms["kl"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradients(student), expected, atol=1e-5, rtol=1e-4)
    fewer = made(student, stored(folder, tmp_path / "few", k=5).attach(BATCH)).terms["kl_topk"]
    assert 0 < float(fewer) < float(full.terms["kl"])


def test_a_store_knows_pieces_in_any_batch_and_says_what_it_lacks(folder, tmp_path):
    store = stored(folder, tmp_path / "store", k=4)
    other_order = pack(PIECES[::-1])
    found = TeacherStore(tmp_path / "store", store.identity).attach(other_order)
    ids = store.attach(BATCH)["teacher_ids"]
    assert torch.equal(found["teacher_ids"], torch.cat(ids.split([len(piece) for piece in PIECES])[::-1]))
    unknown = store.attach(pack([PIECES[0], PIECES[1][:5]]))
    assert "teacher_ids" not in unknown
    student = student_of(folder)
    with pytest.raises(ValueError, match=r"teacher\.cache has no probabilities of a piece"):
        Objective(read_terms({"kl_topk": {}}))(student, unknown)
    with pytest.raises(ValueError, match="teacher: 'a teacher' there, 'another' now"):
        TeacherStore(tmp_path / "store", {"teacher": "another", "k": 4})


def test_a_store_that_was_not_finished_is_filled_up(folder, tmp_path, monkeypatch):
    path = tmp_path / "store"
    first = stored(folder, path, k=4, batches=[pack(PIECES[:1])])
    (path / "0000.partial").write_bytes(b"of a kill")
    looked = []
    monkeypatch.setattr(
        "recipes.teacher_store.hidden_packed",
        lambda model, batch, real=forward_hidden(): looked.append(batch["input_ids"].shape[1]) or real(model, batch),
    )
    again = stored(folder, path, k=4, batches=[pack(PIECES[:1]), pack(PIECES[1:])])
    assert len(first) == 1 and len(again) == 3
    assert looked == [len(PIECES[1]) + len(PIECES[2])]


def forward_hidden():
    from recipes.packed import hidden_packed

    return hidden_packed


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "names no term; allowed are ce, kl, kl_topk, layers"),
        ({"ce": None}, "names no term"),
        ({"mse": {}}, r"objective\.mse is no term"),
        ({"ce": {"temperature": 1}}, r"objective\.ce\.temperature is no field; allowed are weight"),
        ({"kl": {"temperature": 0}}, r"objective\.kl\.temperature must be a number above 0, got 0"),
        ({"kl": {}, "kl_topk": {}}, "both kl and kl_topk"),
        ({"kl_topk": {"k": 0}}, r"objective\.kl_topk\.k must be a whole number of at least 1"),
        ({"layers": {"inputs": "none"}}, r"objective\.layers\.inputs must be teacher or own"),
        ({"ce": {"weight": -1}}, r"objective\.ce\.weight must be a number above 0 or \{from: a, to: b\}"),
        ({"ce": {"weight": {"from": 1}}}, r"objective\.ce\.weight must be"),
        ({"ce": {"weight": float("nan")}}, r"objective\.ce\.weight must be"),
    ],
)
def test_an_objective_that_is_not_clear_is_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        read_terms(terms)


def test_the_loss_of_validation_is_the_plain_cross_entropy(folder):
    model = load(folder)
    targets = shifted_labels(BATCH)
    expected = F.cross_entropy(forward_packed(model, BATCH)[0], targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(next_token(model, BATCH), expected, atol=1e-4, rtol=1e-5)
