"""`dae distill`: a student learns from one teacher, usually a larger one. The stage before alignment.

    l_t = (1 - lambda) * NTP_t + lambda * T^2 * D( p_teacher, p_student )_t  +  a * A_t  +  h * H_t   per response token
    L   = sum_t l_t / N                                                                               per optimizer step

D is the recipe's `divergence` (kd/losses/token_loss.py); A compares attention maps (attention.py), H hidden states
(hidden_states.py), each where the recipe asks for it. With `cross_tokenizer: uld` the teacher may have a tokenizer of
its own, and D is the distance between sorted probabilities (cross_tokenizer.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kd.config.served_recipe import ServedTeacher
from kd.data.chat import load_tokenizer
from kd.data.paired_rows import PairedRows, load_paired_rows
from kd.data.stage_data import StageData, load_stage_data, refuse_unfit_rows
from kd.errors import UserError
from kd.losses.attention import attention_loss, head_groups
from kd.losses.auxiliary import AuxiliaryLoss
from kd.losses.cross_tokenizer import CrossTokenizerLoss
from kd.losses.gradient_reach import refuse_constant_losses
from kd.losses.hidden_states import hidden_state_loss
from kd.losses.layer_pairs import LayerPairs, layer_pairs
from kd.losses.token_loss import TokenLoss
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.compatibility import check_complete, check_tokenizers
from kd.models.forward import learned_positions, unwrapped
from kd.models.offloading import check_offload
from kd.models.quantization import check_quantization
from kd.models.roles import LoadSettings, Role, load_teacher
from kd.stages.distill_recipe import ROUTE, DistillRecipe
from kd.stages.run_stage import RunResult, run_stage
from kd.stages.sft import student_alone
from kd.stages.stage import Inputs, Stage, StageRoles
from kd.training.gathering import TRAINING_ONLY
from kd.training.model_card import Description
from kd.training.objective import Objective, Route
from kd.training.settings import load_settings


class Distill(Stage[DistillRecipe]):
    """The student matches one teacher on the rows of one route."""

    name = "distill"
    recipe = DistillRecipe

    def inputs(self, recipe: DistillRecipe) -> dict[str, Checkpoint]:
        paths = {"base": recipe.base} | ({"teacher": recipe.teacher} if isinstance(recipe.teacher, str) else {})
        return {role: checkpoint(path) for role, path in paths.items()}

    def served(self, recipe: DistillRecipe) -> dict[str, ServedTeacher]:
        return {"teacher": recipe.teacher} if isinstance(recipe.teacher, ServedTeacher) else {}

    def check(self, recipe: DistillRecipe, inputs: Inputs) -> DistillRecipe:
        for role, one in inputs.items():
            one.refuse_adapter(role)
        if recipe.cross_tokenizer is None and "teacher" in inputs:
            check_same_tokenizer(recipe, inputs)
        for one in inputs.values():
            check_complete(one, recipe.trust_remote_code)
        check_quantization(recipe.quantization, inputs, trust_remote_code=recipe.trust_remote_code)
        device, trust = load_settings(recipe).device, recipe.trust_remote_code
        check_offload(recipe.offload_teachers, teacher_inputs(inputs), device, trust_remote_code=trust)
        models = [one.meta_model(recipe.trust_remote_code) for one in inputs.values()]
        if recipe.attention is not None:
            pairs_of("attention", recipe.attention.layers, *models)
            head_groups(*(int(text_config(model).num_attention_heads) for model in models))
        if recipe.hidden is not None:
            pairs_of("hidden", recipe.hidden.layers, *models)
        return recipe

    def load_data(self, recipe: DistillRecipe, inputs: Inputs) -> StageData:
        if recipe.cross_tokenizer is None:
            return load_stage_data(recipe, inputs["base"], [ROUTE], None)
        theirs = load_tokenizer(inputs["teacher"], recipe.data, trust_remote_code=recipe.trust_remote_code)
        load = partial(load_paired_rows, teacher_tokenizer=theirs)
        data = load_stage_data(recipe, inputs["base"], [ROUTE], None, load)
        teacher = unwrapped(inputs["teacher"].meta_model(recipe.trust_remote_code))
        head_rows = int(teacher.get_output_embeddings().weight.shape[0])
        as_teacher = recipe.model_copy(update={"base": recipe.teacher})
        refuse_unfit_rows(as_teacher, in_teacher_tokens(data), head_rows, learned_positions(teacher))
        return data

    def build_roles(self, recipe: DistillRecipe, inputs: Inputs, settings: LoadSettings) -> StageRoles:
        alone = student_alone(recipe, inputs["base"], settings)
        # A cached teacher is not among the inputs.
        teachers = {role: Role(role, load_teacher(one, settings), None) for role, one in teacher_inputs(inputs).items()}
        return replace(alone, teachers=teachers, own_vocabulary=recipe.cross_tokenizer is not None)

    def objective(self, recipe: DistillRecipe, roles: StageRoles) -> Objective:
        teacher = roles.teachers["teacher"]
        if recipe.cross_tokenizer is not None:
            assert isinstance(teacher, Role)
            terms = (CrossTokenizerLoss(recipe.lambda_, teacher),) if recipe.lambda_ > 0 else ()
            routes = (Route(ROUTE, None),)
            return Objective(routes, TokenLoss(0.0), pooled=True, terms=terms, token_weight=1.0 - recipe.lambda_)
        token_loss = TokenLoss(recipe.lambda_, recipe.temperature, recipe.divergence, recipe.beta, recipe.skew)
        terms_of_layers = terms_of(recipe, roles.student, teacher) if isinstance(teacher, Role) else ()
        return Objective((Route(ROUTE, teacher),), token_loss, pooled=True, terms=terms_of_layers)

    def taught_by(self, recipe: DistillRecipe) -> dict[str, str]:
        return {ROUTE: "teacher"}

    def describe(self, recipe: DistillRecipe) -> Description:
        return Description(
            f"A student distilled from the teacher below: `{recipe.base}` trained further to match the teacher's "
            "next-token distribution on the response tokens of the rows below."
        )


def distill(recipe: DistillRecipe) -> RunResult:
    """Train the student to match the teacher; LoRA, or all weights with `lora: null`.

    Returns the finished run; the same recipe over an unfinished run folder goes on with it.
    Raises UserError (recipe, data or checkpoints), MachineError (disk, memory), Stopped (Ctrl-C, SIGTERM).
    """
    return run_stage(Distill(), recipe)


def teacher_inputs(inputs: Inputs) -> dict[str, Checkpoint]:
    """The teacher, where it is not on a server or cached."""
    return {role: one for role, one in inputs.items() if role == "teacher"}


def in_teacher_tokens(data: StageData) -> StageData:
    """The same rows as the teacher reads them."""
    rows = [part.teacher for part in data.rows if isinstance(part, PairedRows)]
    held_out = {name: part.teacher for name, part in data.held_out.items() if isinstance(part, PairedRows)}
    return replace(data, rows=tuple(rows), held_out=held_out)


def check_same_tokenizer(recipe: DistillRecipe, inputs: Inputs) -> None:
    """Raise UserError where the teacher's tokens are not the student's, naming the way that is left."""
    try:
        check_tokenizers(inputs["base"], {"teacher": inputs["teacher"]}, recipe.trust_remote_code)
    except UserError as error:
        raise UserError(f"{error} (With `cross_tokenizer: uld` the tokenizers may differ.)") from error


def text_config(model: nn.Module) -> Any:
    return unwrapped(model).config.get_text_config()


def pairs_of(section: str, layers: Any, student: nn.Module, teacher: nn.Module) -> LayerPairs:
    """The recipe's pairs of layers. Raises UserError for a layer that a model does not have."""
    student_layers, teacher_layers = (int(text_config(model).num_hidden_layers) for model in (student, teacher))
    return layer_pairs(layers, student_layers, teacher_layers, f"{section}.layers")


def terms_of(recipe: DistillRecipe, student: Role, teacher: Role) -> tuple[AuxiliaryLoss, ...]:
    """What is compared beside the next-token distribution; projections are put on the student, to train with it."""
    terms: list[AuxiliaryLoss] = []
    if recipe.attention is not None:
        pairs = pairs_of("attention", recipe.attention.layers, student.model, teacher.model)
        terms.append(attention_loss(recipe.attention.weight, student, teacher, pairs))
    if recipe.hidden is not None:
        pairs = pairs_of("hidden", recipe.hidden.layers, student.model, teacher.model)
        term = hidden_state_loss(recipe.hidden.weight, recipe.hidden.loss, student, teacher, pairs)
        if term.projections is not None:
            student.model.add_module(TRAINING_ONLY, term.projections.to(student.model.device))
        terms.append(term)
    attention, hidden = (None if one is None else one.layers for one in (recipe.attention, recipe.hidden))
    refuse_constant_losses(attention, hidden, student)
    return tuple(terms)
