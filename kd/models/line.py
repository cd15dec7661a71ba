"""A start on the straight line from the base to experts: W = W_base + sum_i w_i (W_expert_i - W_base).

With every weight matrix of experts that are LoRA adapters, the sum is a product of thin factors again:

    sum_i w_i s_i B_i A_i = s [B_1 ... B_k] diag(w_i s_i / s) [A_1; ...; A_k]          s: the student's scaling

so an adapter takes it exactly if its rank is at least the sum of theirs; else it takes the nearest update of its rank,
by the singular value decomposition (Eckart, Young 1936). Of experts with weights of their own, the difference of each
matrix is decomposed. A model whose weights all train takes the sum itself.

Shape legend: O outputs, I inputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from kd.errors import UserError
from kd.models.adapters import base_weights
from kd.models.low_rank import low_rank
from kd.models.offloading import weight_of
from kd.models.quantization import is_quantised
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.models.sharding import gather, put, whole, whole_shape

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


def described(weights: Mapping[str, float]) -> str:
    """A point on the line in words: `the base`, `0.35 of the way to shop`."""
    return ", ".join(f"{weight:g} of the way to {name}" for name, weight in weights.items() if weight) or "the base"


def moving(pulls: Sequence[Pull]) -> list[Pull]:
    """Those that change anything: not of weight 0, nor towards the base (a shared backbone with its adapters off)."""

    def is_base(role: Role) -> bool:
        return role.adapter is None and isinstance(role.model, PeftModel)

    return [pull for pull in pulls if pull.weight and not is_base(pull.expert)]


def refuse_unsummable(pull: Pull, student: nn.Module) -> None:
    """Raise UserError if a difference to the base cannot be summed.

    Of an adapter: more than plain low-rank updates of linear layers. Of another expert: other weights than the base,
    or quantised ones.
    """
    role = pull.expert
    if role.adapter is None:
        if is_quantised(student) or is_quantised(role.model):
            raise UserError(no_line_to_quantised(role.name))
        theirs, base = (_shapes(model) for model in (role.model, student))
        if odd := sorted(theirs.items() ^ base.items()):
            raise UserError(
                f"start: {role.name}: {odd[0][0]} is missing or has another shape on one side, so there is no line "
                "from the base to this expert; use start=base"
            )
        return
    for name, module in role.model.named_modules():
        if found := _beyond_a_sum(module, role.adapter):
            raise UserError(
                f"start: {role.name}: {name} {found}, which is no sum of low-rank updates; use start=base, or merge "
                "the expert (`dae merge weights ... weight=1`) and give the checkpoint"
            )


def no_line_to_quantised(expert: str) -> str:
    """Why there is no line to an expert with weights of its own that are quantised, and what helps.

    Of two quantised matrices the difference is for the most part that of their rounding.
    """
    return (
        f"start: {expert}: has weights of its own, and with `quantization` their difference to the base is lost in "
        "rounding; make an adapter of it (dae merge to-lora --reference BASE --expert EXPERT --output ADAPTER) and "
        "give that, or use start=base"
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model without its adapters."""
    weights = (
        base_weights(model) if isinstance(model, PeftModel) else dict(model.named_parameters(remove_duplicate=False))
    )
    return {name: whole_shape(weight) for name, weight in weights.items()}


def _beyond_a_sum(module: Any, adapter: str) -> str:
    """What an adapter has on a module besides a low-rank update of a linear layer, or empty."""
    if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._get_available_adapters():
        return "is kept whole or by rows (modules_to_save, trainable_token_indices)"
    if not isinstance(module, LoraLayer) or adapter not in module.r:
        return ""
    if module.use_dora.get(adapter):
        return "has a magnitude (use_dora)"
    if isinstance(module, ParamWrapper):
        return "has adapted parameters (target_parameters)"
    factors: Any = module.lora_A
    if adapter not in factors or len(whole_shape(factors[adapter].weight)) != 2:
        return "is no linear layer"
    return "has a bias of its own (lora_bias)" if module.lora_bias.get(adapter) else ""


def start_adapter(student: Role, pulls: Sequence[Pull]) -> Energy:
    """Set the student's adapter to the point of the line; weights that are not of its layers stay the base's.

    Raises UserError where it cannot take at least LEAST_ENERGY of the squared difference, or an expert is no sum of
    low-rank updates. Pulls of weight 0 change nothing, to the bit.
    """
    pulls = moving(pulls)
    if not pulls:
        return Energy(0.0, 0.0)
    for pull in pulls:
        refuse_unsummable(pull, student.model)
    layers = dict(_lora_layers(student.model))
    taken = [_start_layer(name, layer, pulls) for name, layer in layers.items()]
    rest = _left_out(student, set(layers), [pull for pull in pulls if pull.expert.adapter is None])
    energy = Energy(sum(one.whole for one in taken) + rest, sum(one.kept for one in taken))
    if energy.share < LEAST_ENERGY:
        raise UserError(
            f"start: the student's adapter can take only {energy.share:.0%} of the experts' squared difference to the "
            f"base, less than {LEAST_ENERGY:.0%}; raise lora.rank, adapt more layers (lora.target_modules), or use "
            "start=base"
        )
    return energy


def start_all_weights(student: nn.Module, pulls: Sequence[Pull]) -> None:
    """Add the pulls to a model that has the base's weights."""
    pulls = moving(pulls)
    for pull in pulls:
        refuse_unsummable(pull, student)
    with torch.no_grad():
        for name, weight in student.named_parameters() if pulls else ():
            base = whole(weight)
            update = sum((pull.weight * _difference(pull.expert, name, base) for pull in pulls), torch.zeros(()))
            put(weight, base + update.to(base))


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


def _start_layer(name: str, layer: Any, pulls: Sequence[Pull]) -> Energy:
    """Set the student's factors of one layer, if it has any there."""
    thin, dense = _thin(layer, pulls), _dense(name, layer, pulls)
    if thin is None and dense is None:
        return Energy(0.0, 0.0)
    if STUDENT_ADAPTER not in layer.lora_A:
        return Energy(_squared_norm(thin, dense), 0.0)
    a_RI, b_OR, energy = _nearest(thin, dense, int(layer.r[STUDENT_ADAPTER]))
    ours_a, ours_b = layer.lora_A[STUDENT_ADAPTER].weight, layer.lora_B[STUDENT_ADAPTER].weight
    rank = len(a_RI)
    whole_a_RI, whole_b_OR = whole(ours_a).detach().clone(), whole(ours_b).detach().clone()
    whole_a_RI[:rank] = a_RI.to(whole_a_RI)
    whole_b_OR[:, :rank] = (b_OR / layer.scaling[STUDENT_ADAPTER]).to(whole_b_OR)
    put(ours_a, whole_a_RI)
    put(ours_b, whole_b_OR)
    return energy


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


def _nearest(thin: tuple[Tensor, Tensor] | None, dense: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Energy]:
    """Factors a_RI, b_OR of at most this rank, nearest to the update, and what they keep of it."""
    if dense is None:
        assert thin is not None
        a_RI, b_OR = thin
        if len(a_RI) <= rank:
            whole = _squared_norm(thin, None)
            return a_RI, b_OR, Energy(whole, whole)
        # The factors' own small matrix has the update's singular values: no [O, I] matrix is decomposed.
        q_b, r_b = torch.linalg.qr(b_OR.double())
        q_a, r_a = torch.linalg.qr(a_RI.double().T)
        small = low_rank((r_b @ r_a.T).float(), rank, None)
        return small.a_RI @ q_a.T.float().cpu(), q_b.float().cpu() @ small.b_OR, Energy(small.whole, small.kept)
    update = dense if thin is None else dense + thin[1] @ thin[0]
    found = low_rank(update, rank, None)
    return found.a_RI, found.b_OR, Energy(found.whole, found.kept)


def _squared_norm(thin: tuple[Tensor, Tensor] | None, dense: Tensor | None) -> float:
    if dense is not None:
        update = dense if thin is None else dense + thin[1] @ thin[0]
        return float(update.double().square().sum())
    assert thin is not None
    a_RI, b_OR = thin[0].double(), thin[1].double()
    return float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())


def _left_out(student: Role, layers: set[str], pulls: Sequence[Pull]) -> float:
    """Squared norm of the differences outside of adapted layers, of experts with weights of their own."""
    if not pulls:
        return 0.0
    total, carried = 0.0, {f"{name}.weight" for name in layers}
    assert isinstance(student.model, PeftModel)
    for name, weight in base_weights(student.model).items():
        if name not in carried:
            base = whole(weight).detach()
            update = sum((pull.weight * _difference(pull.expert, name, base) for pull in pulls), torch.zeros(()))
            total += float(update.double().square().sum())
    return total
