"""Read responses, compute rewards, compute the student's losses, rank (car.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dae.rank_teachers.car import Measured, Ranking, rank, refuse_negative
from dae.rank_teachers.folder import RankFolder
from dae.rank_teachers.recipe import ARITHMETIC, RankRecipe
from dae.rank_teachers.responses import Response, read_responses, same_prompts
from dae.rank_teachers.rewards import (
    encode_conversations,
    open_reward_model,
    open_tokenizer,
    reward_config,
    rewards_of,
    template_sha256,
)
from dae.rank_teachers.student_losses import encode_responses, losses_of, open_student, without_prompt
from dae.sampling.sample import progress
from kd.data.fingerprint import data_sha256
from kd.data.token_rows import TokenRow
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.roles import LoadSettings
from kd.models.tokenizer_files import tokenizer_sha256

logger = logging.getLogger("dae")

FEW_PROMPTS = 30  # with fewer, percentile intervals are noticeably too narrow


@dataclass(frozen=True)
class Models:
    """Those that measure the candidates."""

    student: Checkpoint
    reward_model: Checkpoint


def load_settings(recipe: RankRecipe) -> LoadSettings:
    """dtype and device of student and reward model: `auto` is bfloat16 on an accelerator that has it, else float32."""
    on_gpu = torch.cuda.is_available()
    wants_bf16 = recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    dtype = torch.bfloat16 if wants_bf16 else torch.float32
    return LoadSettings(dtype, None, recipe.trust_remote_code, "cuda" if on_gpu else "cpu")


def settings_of(recipe: RankRecipe, models: Models) -> dict[str, Any]:
    """Everything that determines rewards and losses: recipe and fingerprints of student, reward model and files.

    Raises UserError if one of them is not found.
    """
    settings = recipe.model_dump(mode="json", exclude={"output", *ARITHMETIC})
    settings["content of student"] = models.student.fingerprint
    if (base := models.student.base) is not None:
        settings["content of its base"] = base.fingerprint
    models.reward_model.refuse_adapter("reward_model")
    settings["content of reward_model"] = models.reward_model.fingerprint
    settings["chat template of student"] = template_sha256(student_tokenizer(recipe, models))
    settings["chat template of reward_model"] = template_sha256(reward_tokenizer(recipe, models))
    settings["tokenizer of student"] = tokenizer_sha256(models.student.tokenizer_home.folder)
    settings["tokenizer of reward_model"] = tokenizer_sha256(models.reward_model.folder)
    if recipe.prompts is not None:
        settings["content of prompts"] = data_sha256(recipe.prompts)
    return settings


def student_tokenizer(recipe: RankRecipe, models: Models) -> Any:
    home = models.student.tokenizer_home
    return open_tokenizer(home, recipe.chat_template, "chat_template", recipe.trust_remote_code)


def reward_tokenizer(recipe: RankRecipe, models: Models) -> Any:
    key = "reward_chat_template"
    return open_tokenizer(models.reward_model, recipe.reward_chat_template, key, recipe.trust_remote_code)


def measure_and_rank(
    recipe: RankRecipe,
    models: Models,
    files: Mapping[str, str],
    expected: Sequence[tuple[str, str]] | None,
    folder: RankFolder,
) -> Ranking:
    """Rank candidates by their responses, and write ranking.json. Kept results are not computed again.

    Args:
        recipe: its candidates' paths are not read here.
        models: student and reward model.
        files: candidate -> the path of its responses.
        expected: (location, key) of the prompts that all must answer; None: those of the first candidate.
        folder: claimed by this process.

    Raises:
        UserError: see the functions this calls; before the first model is loaded if possible.
        MachineError: the disk is full. Finished results are kept.
    """
    reward_config(models.reward_model, recipe.trust_remote_code)
    answered = read_candidates(files, expected)
    conversations, rows = encoded(recipe, models, answered)
    measure_rewards(recipe, models, answered, conversations, folder)
    if not recipe.shift:
        rewards = {name: kept(folder, "rewards", name)["rewards"] for name in answered}
        refuse_negative({name: float(sum(values) / len(values)) for name, values in rewards.items()})
    measure_losses(recipe, models, answered, rows, folder)
    keys = [response.key for response in next(iter(answered.values()))]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    measured = {name: Measured(**kept(folder, "rewards", name), **kept(folder, "losses", name)) for name in answered}
    ranking = rank(measured, [number[key] for key in keys], recipe.betas, shift=recipe.shift, seed=recipe.seed)
    if ranking.prompts < FEW_PROMPTS:
        logger.warning("only %d prompts: the intervals are too narrow", ranking.prompts)
    folder.finish({**asdict(ranking), "betas": recipe.betas, "output": recipe.output})
    return ranking


def read_candidates(
    files: Mapping[str, str], expected: Sequence[tuple[str, str]] | None = None
) -> dict[str, list[Response]]:
    """Each candidate's responses, all in the order of the expected prompts. Raises UserError."""
    answered = {name: read_responses(path) for name, path in files.items()}
    if expected is None:
        expected = [(response.location, response.key) for response in next(iter(answered.values()), [])]
    return {name: same_prompts(expected, files[name], responses) for name, responses in answered.items()}


def encoded(
    recipe: RankRecipe, models: Models, answered: Mapping[str, Sequence[Response]]
) -> tuple[dict[str, list[list[int]]], dict[str, list[TokenRow]]]:
    """(token ids for the reward model, rows for the student) of each candidate. Raises UserError."""
    config = reward_config(models.reward_model, recipe.trust_remote_code)
    judge, pupil = reward_tokenizer(recipe, models), student_tokenizer(recipe, models)
    conversations, rows = {}, {}
    for name, responses in answered.items():
        conversations[name] = encode_conversations(responses, judge, config, models.reward_model)
        rows[name], cut = encode_responses(responses, pupil, recipe.max_length, models.student)
        if cut:
            logger.warning("%s: %d of %d rows truncated to max_length", name, cut, len(responses))
    return conversations, rows


def measure_rewards(
    recipe: RankRecipe,
    models: Models,
    answered: Mapping[str, Sequence[Response]],
    conversations: Mapping[str, Sequence[Sequence[int]]],
    folder: RankFolder,
) -> None:
    """Compute the rewards of every candidate that has none yet."""
    missing = [name for name in answered if folder.computed("rewards", name) is None]
    if not missing:
        return
    model = open_reward_model(models.reward_model, load_settings(recipe))
    for name in missing:
        with progress(f"rewards of {name}", len(conversations[name])) as tick:
            rewards = rewards_of(model, conversations[name], recipe.batch_size, tick)
        refuse_not_finite(f"reward_model: {recipe.reward_model}", rewards, answered[name])
        folder.keep("rewards", name, {"rewards": rewards})
        logger.info("%s: %d rewards", name, len(rewards))


def measure_losses(
    recipe: RankRecipe,
    models: Models,
    answered: Mapping[str, Sequence[Response]],
    rows: Mapping[str, Sequence[TokenRow]],
    folder: RankFolder,
) -> None:
    """Compute the student's losses on every candidate that has none yet."""
    missing = [name for name in answered if folder.computed("losses", name) is None]
    if not missing:
        return
    role, tokenizer = open_student(models.student, load_settings(recipe)), student_tokenizer(recipe, models)
    for name in missing:
        alone_rows = [without_prompt(row, tokenizer) for row in rows[name]]
        with progress(f"student's loss on {name}", 2 * len(alone_rows)) as tick:
            losses = losses_of(role, rows[name], recipe.batch_size, tick)
            alone = losses_of(role, alone_rows, recipe.batch_size, tick)
        refuse_not_finite(f"student: {recipe.student}", [*losses, *alone], [*answered[name], *answered[name]])
        tokens = [sum(row.response_mask) for row in rows[name]]
        folder.keep("losses", name, {"losses": losses, "losses_alone": alone, "tokens": tokens})
        logger.info("%s: the student's loss on %d responses", name, len(losses))


def kept(folder: RankFolder, what: str, name: str) -> dict[str, Any]:
    values = folder.computed(what, name)
    assert values is not None, (what, name)
    return values


def refuse_not_finite(who: str, values: Sequence[float], responses: Sequence[Response]) -> None:
    """Raise UserError naming the first row whose value is not finite."""
    for value, response in zip(values, responses, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{who}: gives {value} for {response.location}; try dtype=float32, or another model")
