"""A start on the straight line from the base to experts: W = W_base + sum_i w_i (W_expert_i - W_base).

With every weight matrix of experts that are LoRA adapters, the sum is a product of thin factors again:

    sum_i w_i s_i B_i A_i = s [B_1 ... B_k] diag(w_i s_i / s) [A_1; ...; A_k]          s: the student's scaling

so an adapter takes it exactly if its rank is at least the sum of theirs; else it takes the nearest update of its rank,
by the singular value decomposition (Eckart, Young 1936). Of experts with weights of their own, the difference of each
matrix is decomposed. A model whose weights all train takes the sum itself.

Shape legend: O outputs, I inputs of a layer, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kd.errors import UserError
from kd.models.adapters import base_weights
from kd.models.low_rank import Factors, low_rank
from kd.models.offloading import weight_of
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.models.sharding import gather, put, whole
from kd.models.summable import refuse_adapted_parameters, refuse_unsummable

LEAST_ENERGY = 0.5  # part of the squared difference that an adapter must be able to take


@dataclass(frozen=True)
class Pull:
    """How far to go towards an expert: w of (expert - base)."""

    expert: Role
    weight: float


@dataclass(frozen=True)
class Energy:
    """Squared norm of the whole difference to the base, and of the part that the student took."""

    whole: float
    kept: float

    @property
    def share(self) -> float:
        return self.kept / self.whole if self.whole else 1.0


@dataclass
class Decomposed:
    """The update of each layer in one direction; of others nothing is kept, as they are as large as the adapter.

    direction: the weight of each expert, the largest of them 1.
    """

    direction: tuple[tuple[str, float], ...] = ()
    layers: dict[str, Factors] = field(default_factory=dict)

    def along(self, pulls: Sequence[Pull]) -> dict[str, Factors]:
        """What is known of the direction of these pulls, to be added to."""
        longest = max(pull.weight for pull in pulls)
        direction = tuple((pull.expert.name, pull.weight / longest) for pull in pulls)
        if direction != self.direction:
            self.direction, self.layers = direction, {}
        return self.layers


def described(weights: Mapping[str, float]) -> str:
    """A point on the line in words: `the base`, `0.35 of the way to shop`."""
    return ", ".join(f"{weight:g} of the way to {name}" for name, weight in weights.items() if weight) or "the base"


def moving(pulls: Sequence[Pull]) -> list[Pull]:
    """Those that change anything: not of weight 0, nor towards the base (a shared backbone with its adapters off)."""

    def is_base(role: Role) -> bool:
        return role.adapter is None and isinstance(role.model, PeftModel)

    return [pull for pull in pulls if pull.weight and not is_base(pull.expert)]


def refuse_expert(student: Role, expert: Role) -> None:
    """Raise UserError where a student cannot go towards an expert, as far as that is known without its weights."""
    refuse_unsummable(expert, student.model)
    if student.adapter is not None and expert.adapter is None:
        refuse_adapted_parameters(expert, dict(_lora_layers(student.model)))


def start_adapter(student: Role, pulls: Sequence[Pull], decomposed: Decomposed | None = None) -> Energy:
    """Set the student's adapter to the point of the line; weights that are not of its layers stay the base's.

    decomposed: what earlier calls for this student found, and this one adds to.

    Raises UserError where it cannot take at least LEAST_ENERGY of the squared difference, or an expert is no sum of
    low-rank updates. Pulls of weight 0 change nothing, to the bit.
    """
    pulls = moving(pulls)
    if not pulls:
        return Energy(0.0, 0.0)
    for pull in pulls:
        refuse_expert(student, pull.expert)
    known = (decomposed or Decomposed()).along(pulls)
    layers = dict(_lora_layers(student.model))
    taken = {name: _start_layer(name, layer, pulls, known) for name, layer in layers.items()}
    lost = {name: one.whole - one.kept for name, one in taken.items()}
    lost |= _left_out(student, set(layers), [pull for pull in pulls if pull.expert.adapter is None])
    kept = sum(one.kept for one in taken.values())
    energy = Energy(kept + sum(lost.values()), kept)
    if energy.share < LEAST_ENERGY:
        raise UserError(_too_little(energy, max(lost, key=lost.__getitem__), student, pulls))
    return energy


def _too_little(energy: Energy, where: str, student: Role, pulls: Sequence[Pull]) -> str:
    """What to do where an adapter cannot take most of the difference. where: the layer or weight that loses most."""
    base: Any = student.model.get_base_model()  # type: ignore[operator]
    module, linear = dict(base.named_modules()).get(where.removesuffix(".weight")), (nn.Linear, Conv1D)
    if isinstance(module, LoraLayer) and STUDENT_ADAPTER in module.lora_A:
        remedy = "raise lora.rank"
    elif isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, linear):
        remedy = "adapt that, too (lora.target_modules)"
    else:
        remedy = "train all weights (lora=null)"
    experts = ", ".join(pull.expert.name for pull in pulls)
    return (
        f"start: {experts}: the student's adapter can take only {energy.share:.0%} of the squared difference to the "
        f"base, less than {LEAST_ENERGY:.0%}; most is lost at {where}: {remedy}, or use start=base"
    )


def start_all_weights(student: nn.Module, pulls: Sequence[Pull]) -> None:
    """Add the pulls to a model that has the base's weights.

    Raises UserError where an expert cannot be summed, or changes weights differently that the base ties.
    """
    pulls = moving(pulls)
    for pull in pulls:
        refuse_unsummable(pull.expert, student)
    tied: dict[int, list[str]] = {}
    for name, weight in student.named_parameters(remove_duplicate=False):
        tied.setdefault(id(weight), []).append(name)
    with torch.no_grad():
        for name, weight in student.named_parameters() if pulls else ():
            base = whole(weight)
            others = tied[id(weight)][1:]
            update = sum((pull.weight * _update(pull.expert, name, others, base) for pull in pulls), torch.zeros(()))
            put(weight, base + update.to(base))


def _update(expert: Role, name: str, others: Sequence[str], base: Tensor) -> Tensor:
    """The difference of a parameter that has other names, too. Raises UserError where it is not the same by each."""
    update = _difference(expert, name, base)
    for other in others:
        if not torch.equal(*torch.broadcast_tensors(update, _difference(expert, other, base))):
            raise UserError(
                f"start: {expert.name}: changes {name} and {other} differently, and the base ties them; use "
                "start=base, or a LoRA student with lm_head in lora.target_modules, which takes the output layer's part"
            )
    return update


def _difference(expert: Role, name: str, base: Tensor) -> Tensor:
    """W_expert - W_base of one parameter, float32 on the base's device; base is whole."""
    if expert.adapter is None:
        theirs = whole(weight_of(expert.model, name)).detach()
        return theirs.to(base.device).float() - base.detach().float()
    base_model: Any = expert.model.get_base_model()  # type: ignore[operator]
    owner: Any = base_model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and expert.adapter in getattr(owner, "lora_A", {}):
        for factors in (owner.lora_A, owner.lora_B):
            gather(factors[expert.adapter])
        update = whole(owner.get_delta_weight(expert.adapter))
        return update.detach().to(base.device).float()
    return torch.zeros((), device=base.device)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every adapted layer by its name in the base."""
    base: Any = model.get_base_model()  # type: ignore[operator]
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _start_layer(name: str, layer: Any, pulls: Sequence[Pull], known: dict[str, Factors]) -> Energy:
    """Set the student's factors of one layer, if it has any there."""
    thin = _thin(layer, pulls)
    is_thin = all(pull.expert.adapter is not None for pull in pulls)
    if thin is None and is_thin:
        return Energy(0.0, 0.0)
    if STUDENT_ADAPTER not in layer.lora_A:
        return Energy(_squared_norm(thin, _dense(name, layer, pulls)), 0.0)
    rank = int(layer.r[STUDENT_ADAPTER])
    if is_thin and thin is not None and len(thin[0]) <= rank:
        found = _exact(thin)
    else:
        longest = max(pull.weight for pull in pulls)
        if name not in known:
            unit = [Pull(pull.expert, pull.weight / longest) for pull in pulls]
            known[name] = _nearest(_thin(layer, unit), _dense(name, layer, unit), rank)
        found = _scaled(known[name], longest)
    ours_a, ours_b = layer.lora_A[STUDENT_ADAPTER].weight, layer.lora_B[STUDENT_ADAPTER].weight
    taken = len(found.a_RI)  # the rest of the rank stays as a new adapter has it
    whole_a_RI, whole_b_OR = whole(ours_a).detach().clone(), whole(ours_b).detach().clone()
    whole_a_RI[:taken] = found.a_RI.to(whole_a_RI)
    whole_b_OR[:, :taken] = (found.b_OR / layer.scaling[STUDENT_ADAPTER]).to(whole_b_OR)
    put(ours_a, whole_a_RI)
    put(ours_b, whole_b_OR)
    return Energy(found.whole, found.kept)


def _thin(layer: Any, pulls: Sequence[Pull]) -> tuple[Tensor, Tensor] | None:
    """The adapters' updates of a layer as factors a_RI, b_OR with all scalings in b; None without any."""
    of_adapters = [(pull, pull.expert.adapter) for pull in pulls if pull.expert.adapter in layer.lora_A]
    if not of_adapters:
        return None
    a = [whole(layer.lora_A[name].weight).detach().float() for _, name in of_adapters]
    b = [
        pull.weight * layer.scaling[name] * whole(layer.lora_B[name].weight).detach().float()
        for pull, name in of_adapters
    ]
    return torch.cat(a), torch.cat(b, dim=1)


def _dense(name: str, layer: Any, pulls: Sequence[Pull]) -> Tensor | None:
    """The summed differences [O, I] of experts with weights of their own; None without any."""
    differences = []
    for pull in (pull for pull in pulls if pull.expert.adapter is None):
        base = whole(layer.get_base_layer().weight).detach().float()
        theirs = whole(weight_of(pull.expert.model, f"{name}.weight")).detach()
        difference = theirs.to(base.device).float() - base
        differences.append(pull.weight * (difference.T if getattr(layer, "fan_in_fan_out", False) else difference))
    return sum(differences[1:], differences[0]) if differences else None


def _exact(thin: tuple[Tensor, Tensor]) -> Factors:
    """The factors as they are, without what is 0 in both: neither would ever have a gradient."""
    a_RI, b_OR = thin
    size = _squared_norm(thin, None)
    alive_R = (a_RI != 0).any(dim=1) | (b_OR != 0).any(dim=0)
    return Factors(a_RI[alive_R], b_OR[:, alive_R], size, size)


def _nearest(thin: tuple[Tensor, Tensor] | None, dense: Tensor | None, rank: int) -> Factors:
    """Factors of at most this rank, nearest to the update, and what they keep of it."""
    if dense is None:
        assert thin is not None
        a_RI, b_OR = thin
        # The factors' own small matrix has the update's singular values: no [O, I] matrix is decomposed.
        q_b, r_b = torch.linalg.qr(b_OR.double())
        q_a, r_a = torch.linalg.qr(a_RI.double().T)
        small = _without_rounding(low_rank((r_b @ r_a.T).float(), rank, None))
        return Factors(small.a_RI @ q_a.T.float().cpu(), q_b.float().cpu() @ small.b_OR, small.whole, small.kept)
    update = dense if thin is None else dense + thin[1] @ thin[0]
    return _without_rounding(low_rank(update, rank, None))


def _without_rounding(found: Factors) -> Factors:
    """Without components that are 0 up to rounding: with A and B near 0, hardly anything of them would ever train."""
    singular_R = found.a_RI.square().sum(dim=1)  # A and B have the root each
    least = singular_R[0] * max(found.a_RI.shape[1], len(found.b_OR)) * torch.finfo(torch.float32).eps
    alive_R = singular_R > least
    return Factors(found.a_RI[alive_R], found.b_OR[:, alive_R], found.whole, found.kept)


def _scaled(found: Factors, by: float) -> Factors:
    """The factors of `by` times the update."""
    root = math.sqrt(by)
    return Factors(root * found.a_RI, root * found.b_OR, by**2 * found.whole, by**2 * found.kept)


def _squared_norm(thin: tuple[Tensor, Tensor] | None, dense: Tensor | None) -> float:
    if dense is not None:
        update = dense if thin is None else dense + thin[1] @ thin[0]
        return float(update.double().square().sum())
    assert thin is not None
    a_RI, b_OR = thin[0].double(), thin[1].double()
    return float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())


def _left_out(student: Role, layers: set[str], pulls: Sequence[Pull]) -> dict[str, float]:
    """Squared norms of the differences outside of adapted layers, of experts with weights of their own."""
    found, carried = {}, {f"{name}.weight" for name in layers}
    assert isinstance(student.model, PeftModel)
    for name, weight in base_weights(student.model).items() if pulls else ():
        if name not in carried:
            base = whole(weight).detach()
            update = sum((pull.weight * _difference(pull.expert, name, base) for pull in pulls), torch.zeros(()))
            found[name] = float(update.double().square().sum())
    return found
