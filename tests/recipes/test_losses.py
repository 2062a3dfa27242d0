"""The head's losses against fp64, without and with kernels, and what they hold in memory."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recipes import losses_op
from recipes.losses import (
    FullTeacher,
    TopTeacher,
    linear_cross_entropy,
    linear_kl,
    linear_mixture,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


class Case:
    """A student, a teacher with another width, targets and rows with holes."""

    def __init__(self, tokens=23, dim=16, vocabulary=101, *, dtype=torch.float32, bias=False, seed=0):
        draw = torch.Generator().manual_seed(seed)

        def random(*shape, size=1.0):
            return (size * torch.randn(*shape, generator=draw)).to(dtype).to(DEVICE)

        self.hidden, self.weight = random(tokens, dim), random(vocabulary, dim, size=0.7)
        self.bias = random(vocabulary) if bias else None
        self.teacher_hidden, self.teacher_weight = random(tokens, dim + 3), random(vocabulary, dim + 3, size=0.7)
        self.teacher_bias = random(vocabulary) if bias else None
        self.targets = torch.randint(vocabulary, (tokens,), generator=draw).to(DEVICE)
        self.targets[::4] = -100
        self.rows = (torch.rand(tokens, generator=draw) < 0.7).to(DEVICE)
        self.leaves = [t.requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]

    def top(self, k, temperature=1.0):
        logits = F.linear(self.teacher_hidden.float(), self.teacher_weight.float()) / temperature
        logprobs, ids = logits.log_softmax(-1).topk(k)
        return TopTeacher(ids, logprobs)

    def exact(self):
        """The same in fp64, of tensors of their own."""
        other = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.detach().double().requires_grad_(value.requires_grad)
            setattr(other, name, value)
        other.leaves = [t for t in (other.hidden, other.weight, other.bias) if t is not None]
        return other


def curve(z, scale, softcap):
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(case, *, scale=1.0, softcap=None, temperature=1.0, ce=1.0, kl=0.0, top=None, rows=True):
    """The sum as the formulas say it, in the case's own dtype."""
    y = curve(F.linear(case.hidden, case.weight, case.bias), scale, softcap)
    loss = ce * F.cross_entropy(y, case.targets, reduction="sum", ignore_index=-100)
    if not kl:
        return loss
    q = (y / temperature).softmax(-1)
    if top is None:
        t = curve(F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias), scale, softcap)
        p = (t / temperature).softmax(-1)
    else:
        p = top.logprobs.to(y.dtype).exp()
        q = q.gather(1, top.ids)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    rowwise = (p * (p.log() - q.log())).sum(-1)
    return loss + kl * (rowwise[case.rows] if rows else rowwise).sum()


def gradients(loss, case):
    return torch.autograd.grad(3 * loss, case.leaves)  # a loss that is scaled, as over accumulated batches


def assert_close(got, case, want, exact, *, eps=None):
    """Value and gradients within rounding, as parts of the largest element."""
    eps = eps or 20 * torch.finfo(case.hidden.dtype).eps
    assert got.dtype == torch.promote_types(case.hidden.dtype, torch.float32) and got.shape == ()
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=0)
    for mine, truth in zip(gradients(got, case), gradients(want, exact), strict=True):
        assert (mine.double() - truth).abs().max() <= eps * truth.abs().max()


@pytest.mark.parametrize("chunk_tokens", [7, 100, None])
@pytest.mark.parametrize(("bias", "softcap", "scale"), [(False, None, 1.0), (True, 2.5, 0.3)])
def test_the_cross_entropy_and_its_gradients_are_those_of_whole_logits(backend, chunk_tokens, bias, softcap, scale):
    case = Case(bias=bias)
    got = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "softcap": softcap, "logit_scale": scale},
        **{"chunk_tokens": chunk_tokens, "backend": backend},
    )
    exact = case.exact()
    assert_close(got, case, plain(exact, scale=scale, softcap=softcap), exact)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("bias", "softcap", "scale"), [(False, None, 1.0), (True, 2.5, 0.3)])
def test_the_divergence_and_its_gradients_are_those_of_whole_logits(backend, temperature, bias, softcap, scale):
    case = Case(bias=bias)
    got = linear_kl(
        *(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.rows),
        **{"temperature": temperature, "chunk_tokens": 9, "backend": backend},
        **{"bias": case.bias, "softcap": softcap, "logit_scale": scale},
        **{"teacher_bias": case.teacher_bias, "teacher_softcap": softcap, "teacher_logit_scale": scale},
    )
    exact = case.exact()
    want = plain(exact, ce=0.0, kl=1.0, temperature=temperature, scale=scale, softcap=softcap)
    assert_close(got, case, want, exact)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("k", "softcap"), [(None, None), (None, 4.0), (5, None), (8, 4.0)])
def test_a_mixture_is_the_sum_of_its_parts(backend, k, softcap, temperature):
    case = Case()
    exact = case.exact()
    top = None if k is None else case.top(k, temperature)
    teacher = top or FullTeacher(case.teacher_hidden, case.teacher_weight, softcap=softcap)
    got = linear_mixture(
        *(case.hidden, case.weight, case.targets, teacher, case.rows),
        **{"ce_weight": 0.6, "kl_weight": 1.4, "temperature": temperature},
        **{"softcap": softcap, "chunk_tokens": 10, "backend": backend},
    )
    common = {"softcap": softcap, "temperature": temperature, "top": top}
    assert_close(got.total, case, plain(exact, ce=0.6, kl=1.4, **common), exact)
    torch.testing.assert_close(got.cross_entropy.double(), plain(exact, softcap=softcap).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.kl.double(), plain(exact, ce=0.0, kl=1.0, **common).detach(), rtol=1e-5, atol=0)
    assert not got.cross_entropy.requires_grad and not got.kl.requires_grad


def test_the_divergence_of_a_mixture_counts_the_rows_with_a_target_unless_told(backend):
    case = Case()
    teacher = FullTeacher(case.teacher_hidden, case.teacher_weight)
    got = linear_mixture(case.hidden, case.weight, case.targets, teacher, backend=backend)
    want = linear_kl(case.hidden, case.weight, *teacher[:2], case.targets != -100, backend="torch")
    torch.testing.assert_close(got.kl, want.detach())


def test_a_top_k_of_the_whole_vocabulary_is_the_full_divergence(backend):
    case = Case(vocabulary=32)
    top = case.top(32)
    got = linear_mixture(case.hidden, case.weight, case.targets, top, case.rows, ce_weight=0.0, backend=backend)
    want = linear_kl(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.rows)
    torch.testing.assert_close(got.total, want, rtol=1e-4, atol=0)
    for mine, other in zip(gradients(got.total, case), gradients(want, case), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_a_tiny_rest_of_the_probability_keeps_its_digits(backend):
    # The student gives all tokens outside the top k about e^-30 together: 1 less the others' sum would be rounding.
    hidden = torch.eye(4, device=DEVICE)[:1].requires_grad_()
    weight = torch.zeros(64, 4, device=DEVICE)
    weight[:2, 0] = 34.0
    logprobs = torch.tensor([[0.45, 0.45]], device=DEVICE).log()
    teacher = TopTeacher(torch.tensor([[0, 1]], device=DEVICE), logprobs)
    targets = torch.tensor([-100], device=DEVICE)
    rows = torch.tensor([True], device=DEVICE)
    got = linear_mixture(hidden, weight, targets, teacher, rows, backend=backend).kl
    rest = 62 / (2 * torch.tensor(34.0, dtype=torch.float64).exp())
    p = torch.tensor([0.45, 0.45, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5, rest], dtype=torch.float64)
    torch.testing.assert_close(got.double().cpu(), (p * (p / q).log()).sum(), rtol=1e-6, atol=0)


def test_rows_that_do_not_count_may_hold_anything_and_get_no_gradient(backend):
    case = Case()
    with torch.no_grad():
        case.hidden[case.targets == -100] = 1e30
    teacher = FullTeacher(case.teacher_hidden, case.teacher_weight)
    got = linear_mixture(case.hidden, case.weight, case.targets, teacher, backend=backend)
    d_hidden, d_weight = gradients(got.total, case)
    assert torch.isfinite(got.total) and torch.isfinite(d_weight).all()
    assert not d_hidden[case.targets == -100].any() and d_hidden[case.targets != -100].all(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_whole_logits_in_it(backend, dtype):
    if dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter's bf16 is wrong")
    case = Case(tokens=200, dim=32, vocabulary=300, dtype=dtype)
    exact = case.exact()
    truth = gradients(plain(exact), exact)
    logits = F.linear(case.hidden, case.weight).float()
    theirs = gradients(F.cross_entropy(logits, case.targets, reduction="sum"), case)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, chunk_tokens=10, backend=backend)
    for mine, other, want in zip(gradients(loss, case), theirs, truth, strict=True):
        assert mine.dtype == dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (mine, other))
        assert error <= 1.5 * allowed


def test_the_gradient_of_the_head_adds_up_in_fp32_over_chunks():
    # Every chunk adds the same to one element: in bf16 the sum would stop growing at 256 times it.
    tokens = 1024
    hidden = torch.ones(tokens, 8, device=DEVICE)
    weight = torch.zeros(4, 8, device=DEVICE, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=1).backward()
    torch.testing.assert_close(weight.grad[0], torch.full((8,), -0.75 * tokens, device=DEVICE))


def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_leaves_own():
    case = Case()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(case.hidden, case.weight, case.targets)
        logits = F.linear(case.hidden, case.weight)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    want = F.cross_entropy(logits.float(), case.targets, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(loss, case))


def test_a_frozen_head_and_frozen_states_cost_no_gradient():
    case = Case()
    case.weight.requires_grad_(False)
    linear_cross_entropy(case.hidden, case.weight, case.targets).backward()
    assert case.weight.grad is None and case.hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(case.hidden, case.weight, case.targets).requires_grad


def test_no_tokens_give_no_loss(backend):
    case = Case(tokens=0)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, backend=backend)
    assert loss == 0
    assert not gradients(loss, case)[1].any()


def test_the_gradient_is_the_loss_s_own_by_finite_differences():
    case = Case(tokens=5, dim=4, vocabulary=7).exact()
    teacher = FullTeacher(case.teacher_hidden, case.teacher_weight)

    def total(hidden, weight):
        mixture = linear_mixture(
            *(hidden, weight, case.targets, teacher, case.rows), temperature=1.5, softcap=3.0, chunk_tokens=2
        )
        return mixture.total

    assert torch.autograd.gradcheck(total, (case.hidden, case.weight))


def test_it_compiles_whole(backend):
    case = Case()
    teacher = FullTeacher(case.teacher_hidden, case.teacher_weight)

    def total(hidden, weight):
        return linear_mixture(2 * hidden, weight, case.targets, teacher, chunk_tokens=9, backend=backend).total

    want = total(case.hidden, case.weight)
    got = torch.compile(total, fullgraph=True, backend="aot_eager")(case.hidden, case.weight)
    torch.testing.assert_close(got, want)
    for mine, other in zip(gradients(got, case), gradients(want, case), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_operator_keeps_what_it_promises_to_pytorch():
    case = Case(bias=True)
    none = [None] * 5
    arguments = (case.hidden, case.weight, case.bias, case.targets, None, *none)
    numbers = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 9, torch.float32, torch.float32, [True, True, True], "torch")
    torch.library.opcheck(torch.ops.recipes.linear_loss, (*arguments, *numbers))


@pytest.mark.skipif(DEVICE == "cpu", reason="measures a GPU's memory")
def test_the_peak_of_memory_is_a_chunk_and_not_all_tokens():
    tokens, vocabulary, chunk = 16384, 65536, 1024
    case = Case(tokens, 64, vocabulary, dtype=torch.bfloat16)
    peaks = []
    for each in (chunk, 2 * chunk, 8 * chunk):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(case.hidden, case.weight, case.targets, chunk_tokens=each)
        torch.autograd.grad(loss, case.leaves)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loss
    logits = 2 * chunk * vocabulary  # bytes
    assert peaks[0] < peaks[1] <= peaks[0] + 2 * logits, peaks
    assert peaks[2] - peaks[1] >= 5 * logits and peaks[2] < 2 * tokens * vocabulary, peaks


class Watch(TorchDispatchMode):
    """The largest tensor that is made, and how many chunks of logits `[16, 1000]` are alive when one is made."""

    def __init__(self):
        super().__init__()
        self.largest, self.together, self.logits = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        if function is torch.ops.aten.mm.default and out.shape == (16, 1000):
            self.logits.append(weakref.ref(out))
            self.together = max(self.together, sum(t() is not None for t in self.logits))
        return out


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_ever_made_and_chunks_go_one_by_one(monkeypatch):
    monkeypatch.setattr(losses_op, "_op", torch.no_grad()(losses_op._forward))  # a mode sees no operator from inside
    case = Case(tokens=512, dim=8, vocabulary=1000)
    teacher = FullTeacher(case.teacher_hidden, case.teacher_weight)
    with Watch() as watch:
        linear_mixture(case.hidden, case.weight, case.targets, teacher, chunk_tokens=16)
    assert watch.largest <= 16 * 1000
    assert len(watch.logits) == 64 and watch.together == 2  # the student's and the teacher's


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must be integers \\[23\\]"),
        ({"weight": torch.zeros(5, 3)}, "weight must be floating point"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, message):
    case = Case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets} | changed
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
