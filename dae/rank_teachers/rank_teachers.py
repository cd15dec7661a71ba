"""`dae rank-teachers`: candidates that are checkpoints answer the prompts first; then all are measured alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dae.rank_teachers.car import Ranking
from dae.rank_teachers.folder import RankFolder
from dae.rank_teachers.measuring import Models, measure_and_rank, read_candidates
from dae.rank_teachers.measuring import settings_of as ranking_settings
from dae.rank_teachers.recipe import RankRecipe, answers
from dae.rank_teachers.responses import prompt_key
from dae.sampling.generation import open_writer
from dae.sampling.prompts import read_prompts
from dae.sampling.recipe import SampleRecipe
from dae.sampling.sample import IDLE_BATCHES, Draw, SampleFile, answer, settings_of
from dae.sampling.written_rows import Batch, Prompt
from kd.data.chat import chat_format
from kd.data.fingerprint import data_sha256
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint


def rank_teachers(recipe: RankRecipe) -> Ranking:
    """Rank the candidates; ranking.json is written into the output folder.

    The same recipe goes on where it was stopped. `betas` and `shift` may change in the same folder: nothing but the
    arithmetic is done again.

    Raises:
        UserError: models, files or output cannot be used, prompts differ, rewards are negative, settings differ.
        MachineError: the disk is full. What was computed is kept.
    """
    models = Models(checkpoint(recipe.student), checkpoint(recipe.reward_model))
    asked = {name: checkpoint(path) for name, path in recipe.candidates.items() if answers(path)}
    given = {name: path for name, path in recipe.candidates.items() if name not in asked}
    settings = ranking_settings(recipe, models)
    for name, path in given.items():
        settings[f"content of {name}"] = data_sha256(path)
    for name, candidate in asked.items():
        settings[f"content of {name}"] = candidate.fingerprint
        if (base := candidate.base) is not None:
            settings[f"content of the base of {name}"] = base.fingerprint
    folder = RankFolder(recipe.output, settings)
    with folder.claimed():
        files, expected = dict(given), None
        if recipe.prompts is not None:
            prompts = read_prompts(recipe.prompts)
            expected = [(f"{recipe.prompts}, prompt {place}", prompt_key(p)) for place, p in enumerate(prompts, 1)]
            read_candidates(given, expected)  # a mistake in them is better seen before a model writes for hours
            folder.begin()
            for name, candidate in asked.items():
                files[name] = str(write_responses(recipe, candidate, folder.responses(name), prompts))
        return measure_and_rank(recipe, models, {name: files[name] for name in recipe.candidates}, expected, folder)


def write_responses(recipe: RankRecipe, model: Checkpoint, path: Path, prompts: Sequence[Prompt]) -> Path:
    """Let a model answer every prompt once, sampling as `dae sample` does. Goes on with an unfinished file.

    A response that cannot be a row (empty, cut inside of a character, ...) is drawn again.

    Raises:
        UserError: the model cannot be used, or gives no row for some prompts however often it is asked.
    """
    as_sample = SampleRecipe(
        model=str(model),
        output=str(path),
        rows=len(prompts),
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        prompts=recipe.prompts,
        trust_remote_code=recipe.trust_remote_code,
    )
    file = SampleFile(path, settings_of(as_sample, model))
    with file.claimed() as batches:
        if batches is None:
            return path
        writer = open_writer(model, recipe.trust_remote_code)
        template = writer.tokenizer.get_chat_template() if writer.tokenizer.chat_template else None
        if template is None and not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"{recipe.prompts}: holds messages, but {model} has no chat template; give text prompts")
        fmt = None if template is None else chat_format(writer.tokenizer, template)
        draw = Draw(as_sample, writer)
        while left := unanswered(prompts, batches):
            refuse_to_ask_for_ever(model, recipe.prompts, left, batches)
            batches.append(answer(draw, fmt, left[: recipe.batch_size], len(batches)))
            file.append(batches[-1])
        file.finish(batches, len(prompts))
    return path


def unanswered(prompts: Sequence[Prompt], batches: Sequence[Batch]) -> list[Prompt]:
    """The prompts, in order, that have fewer rows than times they were asked for."""
    rows = Counter(
        prompt_key(row["prompt"] if "prompt" in row else row["messages"][:-1])
        for batch in batches
        for row in batch.rows
    )
    left = []
    for prompt in prompts:
        key = prompt_key(prompt)
        if rows[key]:
            rows[key] -= 1
        else:
            left.append(prompt)
    return left


def refuse_to_ask_for_ever(
    model: Checkpoint, source: str | None, left: Sequence[Prompt], batches: Sequence[Batch]
) -> None:
    """Raise UserError where the last `IDLE_BATCHES` batches answered nothing."""
    last = batches[-IDLE_BATCHES:]
    if len(last) < IDLE_BATCHES or any(batch.rows for batch in last):
        return
    reasons = sum((batch.dropped for batch in last), Counter[str]())
    told = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    raise UserError(
        f"{model}: asked {len(last)} times it gave no response to {len(left)} of the prompts of {source} ({told}), "
        f"first {prompt_key(left[0])[:60]}; leave them out of the prompts"
    )
