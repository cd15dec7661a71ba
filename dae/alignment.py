"""Domain Alignment from Expert (arXiv 2406.19112), from recipe to finished run. Read this file first.

Every training row belongs to a route, and every route has one teacher: the expert on a domain's rows, the frozen
reference on `general`. The student matches its row's teacher, token by token:

    l_t = (1 - lambda) * NTP_t + lambda * T^2 * KL( p_teacher(route) || p_student )_t      per response token t
    L   = sum_r w_r sum_{t in r} l_t  /  sum_r w_r N_r                                     per optimizer step

Where to look next: kd/losses/token_loss.py (l_t), kd/training/objective.py (L), kd/models/roles.py (three roles on one
backbone), kd/data/mixing.py (which rows), kd/stages/run_stage.py (what every stage does around its objective),
dae_eval/drift.py (forgetting).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dae_eval.drift import DriftCallback
from transformers import TrainerCallback

from dae.earlier_student import with_lora_of_student
from dae.recipe import AlignRecipe
from dae.routing import GENERAL, default_route_shares, teachers_by_route
from dae.start import Measure, refuse_unreachable_start, start_student
from dae.templates import chosen_template, remedy, templates_of_roles, warn_of_other_templates
from kd.config.served_recipe import ServedTeacher
from kd.data.drafts import NoChatTemplateError
from kd.data.stage_data import StageData, load_stage_data
from kd.errors import UserError
from kd.losses.token_loss import TokenLoss
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.compatibility import check_adapter, check_complete, check_tokenizers
from kd.models.offloading import check_offload
from kd.models.quantization import check_quantization
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    add_frozen_adapter,
    add_student_adapter,
    load_model,
    load_teacher,
    resume_adapter,
    trainable_model,
)
from kd.stages.stage import Inputs, Stage, StageRoles
from kd.training.budget import RouteBudget
from kd.training.model_card import Description
from kd.training.objective import Objective, Route
from kd.training.settings import load_settings, student_dtype
from kd.training.trainer import RoutedTrainer

PAPER = """\
The method is that of [arXiv 2406.19112](https://arxiv.org/abs/2406.19112):

```bibtex
@misc{kothari2024teacher,
  title         = {A Teacher Is Worth A Million Instructions},
  author        = {Nikhil Kothari and Ravindra Nayak and Shreyas Shetty and Amey Patil and Nikesh Garera},
  year          = {2024},
  eprint        = {2406.19112},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}
```"""


class Align(Stage[AlignRecipe]):
    """The student matches each expert on its domain's rows and the reference on general rows."""

    name = "align"
    recipe = AlignRecipe

    def inputs(self, recipe: AlignRecipe) -> dict[str, Checkpoint]:
        paths = {"base": recipe.base}
        paths |= {role: teacher for role, teacher in teachers_of(recipe).items() if isinstance(teacher, str)}
        if recipe.student_from is not None:
            paths["student_from"] = recipe.student_from
        return {role: checkpoint(path) for role, path in paths.items()}

    def served(self, recipe: AlignRecipe) -> dict[str, ServedTeacher]:
        return {role: one for role, one in teachers_of(recipe).items() if isinstance(one, ServedTeacher)}

    def check(self, recipe: AlignRecipe, inputs: Inputs) -> AlignRecipe:
        check_checkpoints(recipe, inputs)
        check_quantization(recipe.quantization, inputs, trust_remote_code=recipe.trust_remote_code)
        device, trust = load_settings(recipe).device, recipe.trust_remote_code
        check_offload(recipe.offload_teachers, with_own_weights(recipe, inputs), device, trust_remote_code=trust)
        refuse_unreachable_start(recipe, inputs)
        return with_lora_of_student(recipe, inputs)

    def load_data(self, recipe: AlignRecipe, inputs: Inputs) -> StageData:
        templates = templates_of_roles(recipe, inputs)
        routes, shares = [GENERAL, *recipe.expert], default_route_shares(recipe.expert)
        try:
            template = chosen_template(recipe, templates)
            data = load_stage_data(recipe, inputs["base"], routes, shares, chat_template=template)
        except NoChatTemplateError as error:
            raise NoChatTemplateError(error.problem, remedy(recipe, templates)) from error
        warn_of_other_templates(recipe, templates, data)
        return data

    def build_roles(self, recipe: AlignRecipe, inputs: Inputs, settings: LoadSettings) -> StageRoles:
        """Load the student and its teachers on as few copies of the weights as possible.

        A LoRA student shares its backbone with the reference (adapters off) and with adapter experts. A student whose
        weights all train shares with no teacher: "adapters off" would be the student itself, with a KL of zero that
        looks like success. Its teachers share one frozen copy of the base.
        """
        base, earlier = inputs["base"], inputs.get("student_from")
        load_base = load_teacher if is_teachers_alone(recipe, inputs) else load_model
        shared = Backbone(base, load_base(base, settings)) if needs_base(recipe, inputs) else None
        if recipe.lora is not None:
            assert shared is not None
            model = resume_adapter(shared, earlier) if earlier else add_student_adapter(shared, recipe.lora)
            student = Role("student", model, STUDENT_ADAPTER)
        else:
            student = Role("student", trainable_model(earlier or base, settings, student_dtype(recipe)), None)
        teachers = load_teachers(inputs, settings, shared)
        return StageRoles(student, teachers, shared.model if shared is not None else None)

    def start(self, recipe: AlignRecipe, roles: StageRoles, measure: Measure) -> dict[str, Any]:
        return start_student(recipe, roles, measure)

    def objective(self, recipe: AlignRecipe, roles: StageRoles) -> Objective:
        experts = {name: roles.teachers[f"expert.{name}"] for name in recipe.expert}
        factors = recipe.weights if isinstance(recipe.weights, Mapping) else {}
        teachers = teachers_by_route(roles.teachers["reference"], experts)
        return Objective(
            tuple(Route(name, teacher, factors.get(name, 1.0)) for name, teacher in teachers.items()),
            TokenLoss(recipe.lambda_, recipe.temperature, recipe.divergence, recipe.beta, recipe.skew),
            pooled=recipe.weights == "tokens",
            measures_kl=bool(recipe.budget),
        )

    def taught_by(self, recipe: AlignRecipe) -> dict[str, str]:
        return {GENERAL: "reference"} | {name: f"expert.{name}" for name in recipe.expert}

    def in_memory(self, recipe: AlignRecipe, inputs: Inputs, is_new: bool) -> set[str]:
        """The reference where it is the student's own backbone, and experts that the student's start needs."""
        found = set()
        for role, one in teacher_inputs(inputs).items():
            on_backbone = recipe.lora is not None and (one.is_adapter or one.fingerprint == inputs["base"].fingerprint)
            if role == "reference":
                wanted = on_backbone and not one.is_adapter
            else:
                wanted = recipe.start != "base" and (is_new or on_backbone)
            found |= {role} if wanted else set()
        return found

    def callbacks(
        self, recipe: AlignRecipe, data: StageData, roles: StageRoles, trainer: RoutedTrainer
    ) -> list[TrainerCallback]:
        """The budget; on eval sets, the divergence from the reference (forgetting) and from each expert."""
        found: list[TrainerCallback] = [RouteBudget(route, nats) for route, nats in recipe.budget.items()]
        if not data.held_out:
            return found
        # A cached teacher is asked about its own route alone, which the evaluation does already.
        live = roles.live_teachers
        reference = {"reference": live["reference"]} if "reference" in live else {}
        teachers = {GENERAL: reference}
        for name in recipe.expert:
            expert = live.get(f"expert.{name}")
            teachers[name] = reference | ({} if expert is None else {"expert": expert})
        batch_size = trainer.args.per_device_eval_batch_size
        return [*found, DriftCallback(roles.student, teachers, data.held_out, batch_size, trainer.log)]

    def describe(self, recipe: AlignRecipe) -> Description:
        return Description(
            f"A student made by Domain Alignment from Expert (DAE): starting from `{recipe.base}`, it was trained to "
            "match the next-token distribution of an expert on domain rows and of a frozen reference on general rows, "
            "to take on the expert's domain without forgetting the rest.",
            PAPER,
        )


def teachers_of(recipe: AlignRecipe) -> dict[str, str | ServedTeacher]:
    """What each teacher is, by role."""
    experts = {f"expert.{name}": one for name, one in recipe.expert.items()}
    return {"reference": recipe.reference or recipe.base} | experts


def teacher_inputs(inputs: Inputs) -> dict[str, Checkpoint]:
    return {role: one for role, one in inputs.items() if role not in ("base", "student_from")}


def check_checkpoints(recipe: AlignRecipe, inputs: Inputs) -> None:
    """Raise UserError if the checkpoints do not fit together; reads no weights."""
    base = inputs["base"]
    base.refuse_adapter("base")
    check_tokenizers(base, inputs, recipe.trust_remote_code)
    for one in {one.fingerprint: one for one in inputs.values() if not one.is_adapter}.values():
        check_complete(one, recipe.trust_remote_code)
    first_role: dict[str, str] = {}
    for role, one in inputs.items():
        if one.is_adapter and first_role.setdefault(one.path, role) == role:
            check_adapter(role, one, base, recipe.trust_remote_code, shares=True, quantization=recipe.quantization)
    if recipe.student_from is not None and inputs["student_from"].is_adapter != (recipe.lora is not None):
        kind, way = ("an adapter", "merge it") if recipe.lora is None else ("a full checkpoint", "set `lora: null`")
        raise UserError(f"student_from: {recipe.student_from}: is {kind}, which does not fit `lora`; {way}.")


def needs_base(recipe: AlignRecipe, inputs: Inputs) -> bool:
    """Whether a frozen copy of the base is needed: as the student's backbone, or for a teacher on it."""
    base = inputs["base"].fingerprint
    on_base = [one.is_adapter or one.fingerprint == base for one in teacher_inputs(inputs).values()]
    return recipe.lora is not None or any(on_base)


def is_teachers_alone(recipe: AlignRecipe, inputs: Inputs) -> bool:
    """Whether a frozen copy of the base would be for teachers without adapters only."""
    return recipe.lora is None and not any(one.is_adapter for one in teacher_inputs(inputs).values())


def with_own_weights(recipe: AlignRecipe, inputs: Inputs) -> dict[str, Checkpoint]:
    """The teachers on weights that neither train nor carry an adapter."""
    base, teachers = inputs["base"].fingerprint, teacher_inputs(inputs)
    own = {role: one for role, one in teachers.items() if not one.is_adapter and one.fingerprint != base}
    return teachers if is_teachers_alone(recipe, inputs) else own


def load_teachers(inputs: Inputs, settings: LoadSettings, shared: Backbone | None) -> dict[str, Role]:
    """Reference and experts: adapters and the base on the shared backbone, others on their own weights."""
    teachers, base = teacher_inputs(inputs), inputs["base"].fingerprint
    # Adapters first: the first one wraps the backbone, and every role needs the wrapped one.
    adapters = {}
    for role, one in teachers.items():
        if one.is_adapter:
            assert shared is not None
            adapters[role] = add_frozen_adapter(shared, one)
    own: dict[str, Role] = {}
    roles = {}
    for role, one in teachers.items():
        if shared is not None and (role in adapters or one.fingerprint == base):
            roles[role] = Role(role, shared.model, adapters.get(role))
        else:
            if one.fingerprint not in own:
                own[one.fingerprint] = Role(role, load_teacher(one, settings), None)
            roles[role] = Role(role, own[one.fingerprint].model, None)
    return roles
