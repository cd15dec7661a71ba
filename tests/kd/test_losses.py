"""Losses against their definitions, written the slow way in float64."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kd.models.head
from kd.losses import chunked, token_loss
from kd.losses.analytic_gradients import ANALYTIC
from kd.losses.divergences import DIVERGENCES
from kd.losses.token_loss import LossSums, TokenLoss, token_loss_sums
from kd.models.head import Head
from kd.models.teacher_logits import HiddenTeacher, SampledTeacher, TopKTeacher, systematic_samples, top_k

N, D, E, V = 11, 5, 7, 13
SKEW = 0.2
Case = dict[str, Tensor]

# Of one token, from the probabilities of the student (p) and the teacher (q).
DEFINITIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda p, q, _: (q * (q / p).log()).sum(),
    "reverse_kl": lambda p, q, _: (p * (p / q).log()).sum(),
    "jsd": lambda p, q, beta: (
        beta * (q * (q / (beta * q + (1 - beta) * p)).log()).sum()
        + (1 - beta) * (p * (p / (beta * q + (1 - beta) * p)).log()).sum()
    ),
    "skewed_forward_kl": lambda p, q, _: (q * (q / (SKEW * q + (1 - SKEW) * p)).log()).sum(),
    "skewed_reverse_kl": lambda p, q, _: (p * (p / (SKEW * p + (1 - SKEW) * q)).log()).sum(),
    "tvd": lambda p, q, _: (p - q).abs().sum() / 2,
}


def test_every_divergence_has_a_definition_here() -> None:
    assert DEFINITIONS.keys() == DIVERGENCES.keys() >= ANALYTIC.keys()
    for name, analytic in ANALYTIC.items():
        assert list(inspect.signature(analytic).parameters) == list(inspect.signature(DIVERGENCES[name]).parameters)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two or three tokens, so that a chunk of four or five has several; products over the head in three."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 3 * V)
    monkeypatch.setattr(kd.models.head, "CPU_PRODUCT_ROWS", 5)


def random_case(dtype: torch.dtype = torch.float64, padded_rows: int = 0) -> Case:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(N, D),
        "weight": normal(V + padded_rows, D),
        "bias": normal(V + padded_rows),
        "teacher_hidden": normal(N, E),
        "teacher_weight": normal(V, E),
        "labels": torch.randint(0, V, (N,), generator=generator),
    }


def learning(case: Case, *names: str) -> dict[str, Tensor]:
    """Copies of the student's tensors that ask for a gradient."""
    return {name: case[name].clone().requires_grad_() for name in names}


def sums_of(case: Case, hidden: Tensor, head: Head, loss: TokenLoss, chunk_tokens: int | None = None) -> LossSums:
    """The losses against the case's teacher."""
    teacher = HiddenTeacher(case["teacher_hidden"], Head(case["teacher_weight"]))
    return token_loss_sums(hidden, head, case["labels"], loss, teacher, chunk_tokens=chunk_tokens)


def defined_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor, loss: TokenLoss) -> Tensor:
    """The formula of the paper and of the divergences, token by token and word by word, no trick at all."""
    total = torch.zeros((), dtype=logits_NV.dtype)
    name = loss.divergence
    if name == "jsd" and loss.beta in (0, 1):
        name = ("forward_kl", "reverse_kl")[int(loss.beta)]
    for n in range(logits_NV.shape[0]):
        p, q, p1 = (
            torch.exp(z) / torch.exp(z).sum()
            for z in (logits_NV[n] / loss.temperature, teacher_logits_NV[n] / loss.temperature, logits_NV[n])
        )
        divergence = loss.temperature**2 * DEFINITIONS[name](p, q, loss.beta)
        total = total + (1 - loss.weight) * -p1[labels_N[n]].log() + loss.weight * divergence
    return total


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.einsum("nd,vd->nv", hidden, weight)
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize(("divergence", "beta"), [*((d, 0.5) for d in DIVERGENCES), *(("jsd", b) for b in (0, 0.3, 1))])
@pytest.mark.parametrize(("temperature", "weight"), list(itertools.product([1.0, 2.5], [1.0, 0.4, 0.0])))
@pytest.mark.parametrize(("gradient", "scale", "softcap"), [("registered", 0.25, 3.0), ("autograd", 1.0, None)])
def test_value_and_gradients_equal_the_definition(
    gradient: str,
    divergence: str,
    beta: float,
    temperature: float,
    weight: float,
    scale: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no gradient is registered: the formula alone gives the same."""
    if gradient == "autograd":
        monkeypatch.setattr(token_loss, "ANALYTIC", {})
    case, loss = random_case(), TokenLoss(weight, temperature, divergence, beta, SKEW)
    ours, theirs = (learning(case, "hidden", "weight", "bias") for _ in range(2))
    sums = sums_of(case, ours["hidden"], Head(ours["weight"], ours["bias"], scale, softcap), loss, chunk_tokens=4)
    logits = head_logits(theirs["hidden"], theirs["weight"], theirs["bias"], scale, softcap)
    both = logits, case["teacher_hidden"] @ case["teacher_weight"].T, case["labels"]
    expected = defined_loss(*both, loss)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-10, atol=1e-10)
    sums.loss.backward()
    expected.backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-9, atol=1e-10)
    for value, reported in ((sums.kl, TokenLoss()), (sums.ntp, TokenLoss(0.0))):
        torch.testing.assert_close(value, defined_loss(*both, reported).detach(), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        frozen = Head(case["weight"], case["bias"], scale, softcap)
        torch.testing.assert_close(sums_of(case, case["hidden"], frozen, loss).loss, sums.loss, rtol=1e-12, atol=1e-12)


def test_evaluation_forms_no_gradient_of_a_head_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    case, wanted = random_case(), []
    real = token_loss.block_sums
    monkeypatch.setattr(token_loss, "block_sums", lambda *a: (wanted.append(a[-1]), real(*a))[1])
    head = Head(case["weight"].requires_grad_(True), case["bias"].requires_grad_(True))
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            sums_of(case, case["hidden"], head, TokenLoss())
    assert set(wanted[: len(wanted) // 2]) == {False} and set(wanted[len(wanted) // 2 :]) == {True}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_distribution_against_itself_costs_exactly_nothing(
    divergence: str, dtype: torch.dtype, temperature: float
) -> None:
    case = random_case(dtype)
    hidden, weight = learning(case, "hidden", "weight").values()
    loss = TokenLoss(1.0, temperature, divergence, 0.3)
    sums = token_loss_sums(
        hidden, Head(weight), case["labels"], loss, HiddenTeacher(hidden, Head(weight)), chunk_tokens=4
    )
    sums.loss.backward()
    assert sums.loss == 0 and sums.kl == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sizes_of_chunks_and_blocks_do_not_matter(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, results = random_case(), []
    for chunk_tokens, block_tokens in itertools.product((1, 2, 5, 100), (1, 2, 3, 100)):
        monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS", block_tokens * V)
        (hidden,) = learning(case, "hidden").values()
        sums = sums_of(case, hidden, Head(case["weight"]), TokenLoss(0.5, 2.0, divergence, 0.3), chunk_tokens)
        sums.loss.backward()
        results.append((sums.loss.detach(), sums.kl, sums.ntp, hidden.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-12, atol=1e-12)


def test_no_tokens_give_zero_that_is_connected() -> None:
    case = random_case()
    hidden, weight = learning(case, "hidden", "weight").values()
    nothing = {**case, "labels": case["labels"][:0], "teacher_hidden": case["teacher_hidden"][:0]}
    sums = sums_of(nothing, hidden[:0], Head(weight), TokenLoss())
    sums.loss.backward()
    assert sums.loss == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_without_a_teacher_it_is_next_token_loss_and_the_kl_is_unknown() -> None:
    case = random_case()
    (hidden,) = learning(case, "hidden").values()
    sums = token_loss_sums(hidden, Head(case["weight"]), case["labels"], TokenLoss(0.0), chunk_tokens=4)
    expected = torch.nn.functional.cross_entropy(hidden @ case["weight"].T, case["labels"], reduction="sum")
    torch.testing.assert_close(sums.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*torch.autograd.grad(sums.loss, hidden), *torch.autograd.grad(expected, hidden))
    assert sums.kl.isnan() and sums.ntp == sums.loss


def test_differently_padded_vocabularies_meet_on_their_common_rows() -> None:
    case = random_case(padded_rows=6)
    padded = sums_of(case, case["hidden"], Head(case["weight"], case["bias"]), TokenLoss())
    common = sums_of(case, case["hidden"], Head(case["weight"][:V], case["bias"][:V]), TokenLoss())
    assert padded.loss == common.loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_is_computed_for_what_is_frozen(divergence: str) -> None:
    case = random_case()
    case |= learning(case, "teacher_hidden", "teacher_weight", "hidden")
    sums_of(case, case["hidden"], Head(case["weight"]), TokenLoss(divergence=divergence)).loss.backward()
    assert all(case[name].grad is None for name in ("teacher_hidden", "teacher_weight", "weight"))
    assert case["hidden"].grad is not None and case["hidden"].grad.any()


@pytest.mark.parametrize("divergence", ["skewed_forward_kl", "skewed_reverse_kl"])
def test_a_skewed_divergence_is_bounded_where_the_plain_one_is_not(divergence: str) -> None:
    """KL(a || skew a + (1 - skew) b) <= -log skew, whatever a and b are."""
    hidden, eye = torch.tensor([[500.0, 0.0]]), Head(torch.eye(2))
    loss = TokenLoss(1.0, 1.0, divergence, skew=SKEW)
    found = token_loss_sums(hidden, eye, torch.tensor([0]), loss, HiddenTeacher(hidden.flip(1), eye)).loss
    torch.testing.assert_close(found, -torch.tensor(SKEW).log())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_distributions_stay_finite_and_no_divergence_is_negative(divergence: str) -> None:
    hidden, eye = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True), Head(torch.eye(3))
    sums = token_loss_sums(
        hidden, eye, torch.tensor([0]), TokenLoss(divergence=divergence), HiddenTeacher(-hidden, eye)
    )
    sums.loss.backward()
    assert sums.loss > 0 and torch.isfinite(sums.loss)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    half = random_case(torch.bfloat16)
    as_double = {k: v.double() if v.is_floating_point() else v for k, v in half.items()}
    loss = TokenLoss(1.0, 1.0, "jsd", 0.5)
    exact, found = (sums_of(case, case["hidden"], Head(case["weight"]), loss).loss for case in (as_double, half))
    assert found.dtype == torch.float32
    # Only the logits are rounded (8 bits of mantissa), not the sum.
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=1e-3)


# -- the K largest probabilities, and one class for the rest ----------------------------------------------------------


def merged_classes(probabilities_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """[N, K + 1]: the K tokens, and the sum of all others."""
    kept_NK = probabilities_NV.gather(1, ids_NK)
    rest_N = probabilities_NV.scatter(1, ids_NK, 0.0).sum(1)
    return torch.cat([kept_NK, rest_N[:, None]], dim=1)


def case_of_top_k(k: int) -> tuple[Case, Tensor, TopKTeacher]:
    """A case, its teacher's logits, and the teacher as its K largest probabilities."""
    case = random_case()
    case["weight"], case["bias"] = case["weight"][: case["teacher_weight"].shape[0]], case["bias"][:0]
    logits_NV = case["teacher_hidden"] @ case["teacher_weight"].T
    ids_NK, log_q_NK, log_tail_N = top_k(logits_NV, k)
    return case, logits_NV, TopKTeacher(ids_NK.long(), log_q_NK, log_tail_N, logits_NV.shape[1])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("divergence", "weight"), [("forward_kl", 1.0), ("forward_kl", 0.3), ("jsd", 1.0), ("reverse_kl", 1.0)]
)
def test_top_k_is_the_divergence_over_its_classes(divergence: str, weight: float, k: int) -> None:
    case, logits_NV, teacher = case_of_top_k(k)
    loss = TokenLoss(weight, divergence=divergence)
    ours, theirs = (learning(case, "hidden", "weight") for _ in range(2))
    sums = token_loss_sums(ours["hidden"], Head(ours["weight"]), case["labels"], loss, teacher, chunk_tokens=4)
    p_NV = (theirs["hidden"] @ theirs["weight"].T).softmax(-1)
    p_NC, q_NC = (merged_classes(one, teacher.ids_NK) for one in (p_NV, logits_NV.softmax(-1)))
    expected = sum(DEFINITIONS[divergence](p, q, loss.beta) for p, q in zip(p_NC, q_NC, strict=True))
    ntp = -p_NV.gather(1, case["labels"][:, None]).log().sum()
    total = weight * expected + (1 - weight) * ntp
    # What is stored is float32.
    torch.testing.assert_close(sums.loss, total, rtol=1e-6, atol=1e-6)
    sums.loss.backward()
    total.backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-5, atol=1e-6)


def test_top_k_is_a_lower_bound_that_grows_with_k_to_the_whole() -> None:
    case, logits_NV, _ = case_of_top_k(1)
    vocabulary = logits_NV.shape[1]
    found = []
    for k in range(1, vocabulary):
        teacher = case_of_top_k(k)[2]
        found.append(
            float(token_loss_sums(case["hidden"], Head(case["weight"]), case["labels"], TokenLoss(), teacher).kl)
        )
    whole = float(sums_of(case, case["hidden"], Head(case["weight"]), TokenLoss()).kl)
    assert found == sorted(found) and found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-6)  # one token is left in the last class


def test_a_teacher_that_is_certain_has_no_tail_and_no_nan() -> None:
    logits_NV = torch.zeros(2, 6)
    logits_NV[:, 1] = 200.0
    ids_NK, log_q_NK, log_tail_N = top_k(logits_NV, 2)
    teacher = TopKTeacher(ids_NK.long(), log_q_NK, log_tail_N, 6)
    hidden = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    sums = token_loss_sums(hidden, Head(weight), torch.tensor([1, 1]), TokenLoss(), teacher)
    sums.loss.backward()
    assert float(sums.kl.detach()) == pytest.approx(float(sums.ntp), rel=1e-6)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


# -- tokens drawn from the teacher ------------------------------------------------------------------------------------


def every_outcome(logits_V: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(offsets [O], one for each outcome of the draws; probability of each [O]), fp64."""
    crossings = (logits_V.softmax(-1).cumsum(-1) * samples) % 1.0
    edges = torch.cat([crossings.new_zeros(1), crossings.sort().values, crossings.new_ones(1)])
    return (edges[1:] + edges[:-1]) / 2, edges[1:] - edges[:-1]


@pytest.mark.parametrize("samples", [1, 3, 12])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_draws_have_the_value_and_the_gradient_of_forward_kl_on_average(samples: int, weight: float) -> None:
    case, logits_NV, _ = case_of_top_k(1)
    loss = TokenLoss(weight)
    for token in range(len(logits_NV)):
        row = slice(token, token + 1)
        one = {**case, "hidden": case["hidden"][row], "teacher_hidden": case["teacher_hidden"][row]}
        one["labels"] = case["labels"][row]
        exact = learning(one, "hidden", "weight")
        sums = sums_of({**one, **exact}, exact["hidden"], Head(exact["weight"]), loss)
        sums.loss.backward()
        offsets_O, probability_O = every_outcome(logits_NV[token], samples)
        drawn = learning(one, "hidden", "weight")
        mean = torch.zeros((), dtype=torch.float64)
        for offset, probability in zip(offsets_O, probability_O, strict=True):
            ids_NS, entropy_N = systematic_samples(logits_NV[row], offset[None], samples)
            teacher = SampledTeacher(ids_NS.long(), entropy_N, logits_NV.shape[1])
            found = token_loss_sums(drawn["hidden"], Head(drawn["weight"]), one["labels"], loss, teacher)
            (probability * found.loss).backward()
            mean += probability * found.loss.detach()
        torch.testing.assert_close(mean, sums.loss.detach(), rtol=1e-6, atol=1e-6)  # entropies are stored in float32
        for name, tensor in drawn.items():
            torch.testing.assert_close(tensor.grad, exact[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 5, 12])
def test_draws_scatter_less_than_independent_ones(samples: int) -> None:
    _, logits_NV, _ = case_of_top_k(1)
    for logits_V in logits_NV:
        q_V = logits_V.softmax(-1)
        offsets_O, probability_O = every_outcome(logits_V, samples)
        ids_OS, _ = systematic_samples(logits_V.expand(len(offsets_O), -1), offsets_O, samples)
        assert torch.equal(ids_OS, ids_OS.sort(-1).values)
        share_OV = torch.zeros(len(offsets_O), len(q_V), dtype=torch.float64)
        share_OV.scatter_add_(1, ids_OS.long(), torch.full_like(share_OV[:, :1], 1 / samples).expand(ids_OS.shape))
        assert ((share_OV - q_V).abs() < 1 / samples + 1e-12).all()
        variance_V = (probability_O[:, None] * (share_OV - q_V) ** 2).sum(0)
        assert (variance_V <= q_V * (1 - q_V) / samples + 1e-12).all()
        assert variance_V.sum() < 0.95 * (q_V * (1 - q_V)).sum() / samples


def test_draws_of_a_teacher_that_is_certain() -> None:
    logits_NV = torch.zeros(2, 6)
    logits_NV[:, 1] = 1000.0
    ids_NS, entropy_N = systematic_samples(logits_NV, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64), 4)
    assert (ids_NS == 1).all() and (entropy_N == 0).all()
    hidden = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    teacher = SampledTeacher(ids_NS.long(), entropy_N, 6)
    sums = token_loss_sums(hidden, Head(weight), torch.tensor([1, 1]), TokenLoss(), teacher)
    sums.loss.backward()
    assert float(sums.kl) == pytest.approx(float(sums.ntp), rel=1e-6)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
