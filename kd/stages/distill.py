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
from kd.models.adapter_files import refuse_adapter
from kd.models.checkpoint_files import model_fingerprint
from kd.models.compatibility import check_complete, check_tokenizers, empty_model
from kd.models.forward import learned_positions, unwrapped
from kd.models.roles import LoadSettings, Role, load_model, vocabulary_rows
from kd.stages.distill_recipe import ROUTE, DistillRecipe
from kd.stages.sft import student_role
from kd.training.objective import Objective, Route
from kd.training.run_stage import RunResult, StageRoles, run_stage
from kd.training.trainer import TRAINING_ONLY


def distill(recipe: DistillRecipe) -> RunResult:
    """Train the student to match the teacher; LoRA, or all weights with `lora: null`.

    Returns the finished run; the same recipe over an unfinished run folder goes on with it.
    Raises UserError (recipe, data or checkpoints), MachineError (disk, memory), Stopped (Ctrl-C, SIGTERM).
    """
    inputs = fingerprints(recipe)
    check_checkpoints(recipe)
    return run_stage("distill", recipe, inputs, load_data(recipe), lambda settings: build_roles(recipe, settings))


def load_data(recipe: DistillRecipe) -> StageData:
    """The rows of the stage, also in the teacher's tokens where these are others. Raises UserError."""
    if recipe.cross_tokenizer is None:
        return load_stage_data(recipe, [ROUTE], None)
    theirs = load_tokenizer(recipe.teacher, recipe.data, trust_remote_code=recipe.trust_remote_code)
    data = load_stage_data(recipe, [ROUTE], None, partial(load_paired_rows, teacher_tokenizer=theirs))
    teacher = unwrapped(empty_model(recipe.teacher, recipe.trust_remote_code))
    head_rows = int(teacher.get_output_embeddings().weight.shape[0])
    as_teacher = recipe.model_copy(update={"base": recipe.teacher})
    refuse_unfit_rows(as_teacher, in_teacher_tokens(data), head_rows, learned_positions(teacher))
    return data


def in_teacher_tokens(data: StageData) -> StageData:
    """The same rows as the teacher reads them."""
    rows = [part.teacher for part in data.rows if isinstance(part, PairedRows)]
    held_out = {name: part.teacher for name, part in data.held_out.items() if isinstance(part, PairedRows)}
    return replace(data, rows=tuple(rows), held_out=held_out)


def fingerprints(recipe: DistillRecipe) -> dict[str, str]:
    """SHA-256 of base and teacher."""
    return {"base": model_fingerprint(recipe.base), "teacher": model_fingerprint(recipe.teacher)}


def check_checkpoints(recipe: DistillRecipe) -> None:
    """Raise UserError where the checkpoints do not belong together or do not fit the recipe; reads no weights."""
    for role, path in (("base", recipe.base), ("teacher", recipe.teacher)):
        refuse_adapter(path, role)
    if recipe.cross_tokenizer is None:
        check_same_tokenizer(recipe)
    for path in (recipe.base, recipe.teacher):
        check_complete(path, recipe.trust_remote_code)
    models = [empty_model(path, recipe.trust_remote_code) for path in (recipe.base, recipe.teacher)]
    if recipe.attention is not None:
        pairs_of("attention", recipe.attention.layers, *models)
        head_groups(*(int(text_config(model).num_attention_heads) for model in models))
    if recipe.hidden is not None:
        pairs_of("hidden", recipe.hidden.layers, *models)


def check_same_tokenizer(recipe: DistillRecipe) -> None:
    """Raise UserError where the teacher's tokens are not the student's, naming the way that is left."""
    try:
        check_tokenizers(recipe.base, {"teacher": recipe.teacher}, recipe.trust_remote_code)
    except UserError as error:
        raise UserError(f"{error} (With `cross_tokenizer: uld` it may have one of its own.)") from error


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model."""
    return unwrapped(model).config.get_text_config()


def pairs_of(section: str, layers: Any, student: nn.Module, teacher: nn.Module) -> LayerPairs:
    """The recipe's pairs of layers. Raises UserError for a layer that a model does not have."""
    student_layers, teacher_layers = (int(text_config(model).num_hidden_layers) for model in (student, teacher))
    return layer_pairs(layers, student_layers, teacher_layers, f"{section}.layers")


def projection_parameters(recipe: DistillRecipe) -> int:
    """Weights of the projections that the hidden-state loss trains; 0 without it, and where widths are equal."""
    if recipe.hidden is None:
        return 0
    student, teacher = (empty_model(path, recipe.trust_remote_code) for path in (recipe.base, recipe.teacher))
    width, teacher_width = (int(text_config(model).hidden_size) for model in (student, teacher))
    pairs = pairs_of("hidden", recipe.hidden.layers, student, teacher)
    return len(pairs) * width * teacher_width if width != teacher_width else 0


def build_roles(recipe: DistillRecipe, settings: LoadSettings) -> StageRoles:
    """The student, the teacher on weights of its own, and the loss between them."""
    student = student_role(recipe, settings)
    teacher = Role("teacher", load_model(recipe.teacher, settings), None)
    if recipe.cross_tokenizer is not None:
        terms = (CrossTokenizerLoss(recipe.lambda_, teacher),) if recipe.lambda_ > 0 else ()
        objective = Objective(
            (Route(ROUTE, None),), TokenLoss(0.0), pooled=True, terms=terms, token_weight=1.0 - recipe.lambda_
        )
        return StageRoles(student.model, objective, (student, teacher), vocabulary_rows([student]))
    token_loss = TokenLoss(recipe.lambda_, recipe.temperature, recipe.divergence, recipe.beta, recipe.skew)
    objective = Objective((Route(ROUTE, teacher),), token_loss, pooled=True, terms=terms_of(recipe, student, teacher))
    roles = (student, teacher)
    return StageRoles(student.model, objective, roles, vocabulary_rows(roles))


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
    refuse_constant_losses(recipe.attention, recipe.hidden, student)
    return tuple(terms)
