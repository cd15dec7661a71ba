"""The recipe of `dae rank-teachers`. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kd.config.data_recipe import ROUTE_NAME
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import LARGEST_SEED, Frozen
from kd.data.records import FILE_ENDINGS

# What only the arithmetic at the end reads: another value needs no model to be asked again.
ARITHMETIC = frozenset({"betas", "shift"})


class RankRecipe(Frozen):
    """`dae rank-teachers`: whose responses suit this student."""

    student: str = Field(
        min_length=1, description="the model that is to learn, before training: a checkpoint or a LoRA folder"
    )
    candidates: dict[str, str] = Field(
        description="{name: path}: each candidate's responses (a JSONL file or a folder that `datasets` saved), or the "
        "candidate itself (a checkpoint, a LoRA folder or a hub id), which then answers `prompts`"
    )
    reward_model: str = Field(min_length=1, description="a sequence classifier with one label: folder or hub id")
    output: str = Field(min_length=1, description="the folder to write")
    prompts: str | None = Field(
        default=None, min_length=1, description="a JSONL file whose prompts the candidates that are checkpoints answer"
    )
    betas: tuple[float, ...] = Field(
        default=(0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
        description="how much the student's loss discounts the reward: one ranking for each; 0 is the reward alone",
    )
    shift: bool = Field(
        default=False, description="count rewards from the lowest one of all candidates together, which becomes 0"
    )
    max_length: int = Field(default=2048, ge=2, description="longest row of the student in tokens; cut on the right")
    chat_template: str | None = Field(
        default=None, description="`plain` (built in) or a .jinja file, where the student's tokenizer has no template"
    )
    reward_chat_template: str | None = Field(
        default=None, description="the same where the reward model's tokenizer has none"
    )
    batch_size: int = Field(default=8, ge=1, description="rows at a time, in every model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the student and the reward model; auto: bfloat16 on a GPU that has it"
    )
    max_new_tokens: int = Field(default=512, ge=1, description="longest response that a checkpoint writes, in tokens")
    temperature: float = Field(default=1.0, gt=0, description="of its sampling; 1 is its own distribution")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of the sampling and of the bootstrap")
    trust_remote_code: bool = Field(default=False, description="run code that comes with a checkpoint")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = beta_problems(raw.get("betas"))
        candidates = raw.get("candidates")
        if not isinstance(candidates, Mapping):
            return problems
        problems += candidate_problems(candidates)
        answering = [name for name, path in candidates.items() if isinstance(path, str) and path and answers(path)]
        if answering and raw.get("prompts") is None:
            words = f"is missing: candidate `{answering[0]}` is a checkpoint; add --prompts FILE for it to answer"
            problems.append(Problem(("prompts",), NO_VALUE, words))
        if not answering and raw.get("prompts") is not None:
            words = "is read where a candidate is a checkpoint, and all are files of responses: remove it"
            problems.append(Problem(("prompts",), raw["prompts"], words))
        return problems


def answers(path: str) -> bool:
    """Whether a candidate is a model, which is asked, and not the place of its responses."""
    place = Path(path)
    if place.is_dir():
        return not any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return not place.exists() and not path.endswith(FILE_ENDINGS)


def candidate_problems(candidates: Mapping[str, Any]) -> list[Problem]:
    """Fewer than two, names that no file could bear, and empty paths."""
    problems = []
    if len(candidates) < 2:
        words = "a ranking has at least two candidates: add --candidate NAME=PATH"
        problems.append(Problem(("candidates",), NO_VALUE, words))
    for name, path in candidates.items():
        if not ROUTE_NAME.fullmatch(str(name)):
            words = "a name starts with a letter and has letters, digits, - and _ only"
            problems.append(Problem(("candidates", str(name)), path, words))
        elif path == "":
            problems.append(Problem(("candidates", name), path, "must not be empty"))
    return problems


def beta_problems(betas: Any) -> list[Problem]:
    """No beta at all, negative ones, and one given twice."""
    if not isinstance(betas, tuple):
        return []
    if not betas:
        return [Problem(("betas",), (), "is empty: give at least one, such as betas=[0,1]")]
    problems = [
        Problem(("betas", place), beta, "must be at least 0")
        for place, beta in enumerate(betas)
        if isinstance(beta, (int, float)) and beta < 0
    ]
    if len(set(map(str, betas))) < len(betas):
        problems.append(Problem(("betas",), betas, "holds a value twice: remove one"))
    return problems
