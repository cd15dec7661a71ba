"""Losses against their definitions, written the slow way in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kd.losses import token_loss as losses
from kd.losses.token_loss import TokenLoss, token_loss_sums
from kd.models import head as head_module
from kd.models.head import Head

N, D, E, V = 11, 5, 7, 13
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"]
SKEW = 0.2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two or three tokens, so that a chunk of four or five has several; products over the head in three."""
    monkeypatch.setattr(losses, "CPU_BLOCK_ELEMENTS", 3 * V)
    monkeypatch.setattr(head_module, "CPU_PRODUCT_ROWS", 5)


def random_case(dtype: torch.dtype = torch.float64, padded_rows: int = 0) -> dict[str, Tensor]:
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


def defined_loss(
    logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    labels_N: Tensor,
    weight: float,
    temperature: float,
    divergence: str,
    beta: float,
) -> Tensor:
    """The formula of the paper and of the divergences, token by token and word by word, no trick at all."""
    total = torch.zeros((), dtype=logits_NV.dtype)
    for n in range(logits_NV.shape[0]):
        p = torch.exp(logits_NV[n] / temperature) / torch.exp(logits_NV[n] / temperature).sum()
        q = torch.exp(teacher_logits_NV[n] / temperature) / torch.exp(teacher_logits_NV[n] / temperature).sum()
        p1 = torch.exp(logits_NV[n]) / torch.exp(logits_NV[n]).sum()
        if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
            d = (q * (q / p).log()).sum()
        elif divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
            d = (p * (p / q).log()).sum()
        elif divergence == "skewed_forward_kl":
            d = (q * (q / (SKEW * q + (1 - SKEW) * p)).log()).sum()
        elif divergence == "skewed_reverse_kl":
            d = (p * (p / (SKEW * p + (1 - SKEW) * q)).log()).sum()
        else:
            m = beta * q + (1 - beta) * p
            d = beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
        total = total + (1 - weight) * -p1[labels_N[n]].log() + weight * temperature**2 * d
    return total


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.einsum("nd,vd->nv", hidden, weight)
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize(("divergence", "beta"), [*((d, 0.5) for d in DIVERGENCES), *(("jsd", b) for b in (0, 0.3, 1))])
@pytest.mark.parametrize(("temperature", "weight"), list(itertools.product([1.0, 2.5], [1.0, 0.4, 0.0])))
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_value_and_gradients_equal_the_definition(
    divergence: str, beta: float, temperature: float, weight: float, scale: float, softcap: float | None
) -> None:
    case = random_case()
    ours = {k: case[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    sums = token_loss_sums(
        ours["hidden"],
        Head(ours["weight"], ours["bias"], scale, softcap),
        case["labels"],
        TokenLoss(weight, temperature, divergence, beta, SKEW),  # type: ignore[arg-type]
        case["teacher_hidden"],
        Head(case["teacher_weight"]),
        chunk_tokens=4,
    )
    theirs = {k: case[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    logits = head_logits(theirs["hidden"], theirs["weight"], theirs["bias"], scale, softcap)
    teacher_logits = case["teacher_hidden"] @ case["teacher_weight"].T
    expected = defined_loss(logits, teacher_logits, case["labels"], weight, temperature, divergence, beta)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-10, atol=1e-10)
    sums.loss.backward()
    expected.backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-9, atol=1e-10)
    forward_kl = defined_loss(logits, teacher_logits, case["labels"], 1.0, 1.0, "forward_kl", 0.5)
    torch.testing.assert_close(sums.kl, forward_kl.detach(), rtol=1e-10, atol=1e-10)
    ntp = defined_loss(logits, teacher_logits, case["labels"], 0.0, 1.0, "forward_kl", 0.5)
    torch.testing.assert_close(sums.ntp, ntp.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_pass_gradcheck(divergence: str) -> None:
    case = random_case()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, 0.7, 3.0)
        token_loss = TokenLoss(0.6, 1.7, divergence, 0.3, SKEW)  # type: ignore[arg-type]
        teacher = Head(case["teacher_weight"])
        return token_loss_sums(
            hidden, head, case["labels"], token_loss, case["teacher_hidden"], teacher, chunk_tokens=3
        ).loss

    inputs = tuple(case[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_distribution_against_itself_costs_exactly_nothing(
    divergence: str, dtype: torch.dtype, temperature: float
) -> None:
    case = random_case(dtype)
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    token_loss = TokenLoss(1.0, temperature, divergence, 0.3)  # type: ignore[arg-type]
    sums = token_loss_sums(hidden, Head(weight), case["labels"], token_loss, hidden, Head(weight), chunk_tokens=4)
    sums.loss.backward()
    assert sums.loss == 0 and sums.kl == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sizes_of_chunks_and_blocks_do_not_matter(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    results = []
    for chunk_tokens, block_tokens in itertools.product((1, 2, 5, 100), (1, 2, 3, 100)):
        monkeypatch.setattr(losses, "CPU_BLOCK_ELEMENTS", block_tokens * V)
        hidden = case["hidden"].clone().requires_grad_()
        token_loss = TokenLoss(0.5, 2.0, divergence, 0.3)  # type: ignore[arg-type]
        teacher = Head(case["teacher_weight"])
        sums = token_loss_sums(
            hidden,
            Head(case["weight"]),
            case["labels"],
            token_loss,
            case["teacher_hidden"],
            teacher,
            chunk_tokens=chunk_tokens,
        )
        sums.loss.backward()
        results.append((sums.loss.detach(), sums.kl, sums.ntp, hidden.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-12, atol=1e-12)


def test_no_tokens_give_zero_that_is_connected() -> None:
    case = random_case()
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    teacher = Head(case["teacher_weight"])
    sums = token_loss_sums(
        hidden[:0], Head(weight), case["labels"][:0], TokenLoss(), case["teacher_hidden"][:0], teacher
    )
    sums.loss.backward()
    assert sums.loss == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_differently_padded_vocabularies_meet_on_their_common_rows() -> None:
    case = random_case(padded_rows=6)
    teacher = Head(case["teacher_weight"])
    padded = token_loss_sums(
        case["hidden"], Head(case["weight"], case["bias"]), case["labels"], TokenLoss(), case["teacher_hidden"], teacher
    )
    cut = Head(case["weight"][:V], case["bias"][:V])
    common = token_loss_sums(case["hidden"], cut, case["labels"], TokenLoss(), case["teacher_hidden"], teacher)
    assert padded.loss == common.loss


def test_nothing_is_computed_for_what_is_frozen() -> None:
    case = random_case()
    teacher_hidden = case["teacher_hidden"].clone().requires_grad_()
    teacher_weight = case["teacher_weight"].clone().requires_grad_()
    hidden = case["hidden"].clone().requires_grad_()
    head = Head(case["weight"])
    sums = token_loss_sums(hidden, head, case["labels"], TokenLoss(), teacher_hidden, Head(teacher_weight))
    sums.loss.backward()
    assert teacher_hidden.grad is None and teacher_weight.grad is None and case["weight"].grad is None
    assert hidden.grad is not None and hidden.grad.any()


@pytest.mark.parametrize("divergence", ["skewed_forward_kl", "skewed_reverse_kl"])
def test_a_skewed_divergence_is_bounded_where_the_plain_one_is_not(divergence: str) -> None:
    """KL(a || skew a + (1 - skew) b) <= -log skew, whatever a and b are."""
    hidden, eye = torch.tensor([[500.0, 0.0]]), Head(torch.eye(2))
    token_loss = TokenLoss(1.0, 1.0, divergence, skew=SKEW)  # type: ignore[arg-type]
    loss = token_loss_sums(hidden, eye, torch.tensor([0]), token_loss, hidden.flip(1), eye).loss
    torch.testing.assert_close(loss, -torch.tensor(SKEW).log())


def test_far_apart_distributions_stay_finite_and_jsd_is_never_negative() -> None:
    logits = torch.tensor([[100.0, -100.0, 0.0]])
    eye = Head(torch.eye(3))
    for divergence in DIVERGENCES:
        hidden = logits.clone().requires_grad_()
        token_loss = TokenLoss(1.0, 1.0, divergence, 0.5)  # type: ignore[arg-type]
        sums = token_loss_sums(hidden, eye, torch.tensor([0]), token_loss, -logits, eye)
        sums.loss.backward()
        assert sums.loss > 0 and torch.isfinite(sums.loss)
        assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    exact, half = random_case(torch.float64), random_case(torch.bfloat16)
    as_double = {k: half[k].double() if half[k].is_floating_point() else half[k] for k in half}
    token_loss = TokenLoss(1.0, 1.0, "jsd", 0.5)
    results = [
        token_loss_sums(
            c["hidden"], Head(c["weight"]), c["labels"], token_loss, c["teacher_hidden"], Head(c["teacher_weight"])
        )
        for c in (as_double, half)
    ]
    assert results[1].loss.dtype == torch.float32
    # Only the logits are rounded (8 bits of mantissa), not the sum.
    torch.testing.assert_close(results[1].loss.double(), results[0].loss, rtol=2e-2, atol=1e-3)
    assert exact["hidden"].dtype == torch.float64
