"""The recipe of `dae rank-teachers`. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from kd.config.data_recipe import ROUTE_NAME
from kd.config.flags import NAME_RULE, CommandRecipe, Flag, split_name
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import LARGEST_SEED
from kd.data.hub import FILE_ENDINGS
from kd.errors import UserError

# Keys that only the arithmetic at the end reads: changing them runs no model again.
ARITHMETIC = frozenset({"betas", "shift"})


class RankRecipe(CommandRecipe):
    """`dae rank-teachers`: which teacher's responses suit this student."""

    summary: ClassVar[str] = "Rank teachers for a student by compatibility-adjusted reward (CAR)."
    flags: ClassVar[tuple[Flag, ...]] = (
        Flag("student", "student", "CKPT", "student before training"),
        Flag("candidate", "candidates", "NAME=PATH", "file of responses, or checkpoint to sample; repeats", True),
        Flag("reward-model", "reward_model", "CKPT", "sequence classifier with one label"),
        Flag("prompts", "prompts", "FILE", "JSONL with prompts for candidates that are checkpoints"),
    )

    student: str = Field(min_length=1, description="the student before training: a checkpoint or a LoRA folder")
    candidates: dict[str, str] = Field(
        description="{name: path}: each candidate's responses (a JSONL file or a folder saved by `datasets`), or a "
        "checkpoint (folder, LoRA folder or hub id) that answers `prompts`"
    )
    reward_model: str = Field(min_length=1, description="a sequence classifier with one label: folder or hub id")
    output: str = Field(min_length=1, description="the folder to write")
    prompts: str | None = Field(
        default=None, min_length=1, description="JSONL file with prompts for candidates that are checkpoints"
    )
    betas: tuple[float, ...] = Field(
        default=(0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
        description="how much the student's loss discounts the reward; one ranking per beta; 0: reward alone",
    )
    shift: bool = Field(default=False, description="subtract the lowest reward of all candidates from every reward")
    max_length: int = Field(default=2048, ge=2, description="maximum tokens of a student's row; truncated on the right")
    chat_template: str | None = Field(
        default=None, description="`plain` (built in) or a .jinja file, where the student's tokenizer has no template"
    )
    reward_chat_template: str | None = Field(default=None, description="the same for the reward model")
    batch_size: int = Field(default=8, ge=1, description="rows per batch, for every model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of student and reward model; auto: bfloat16 on a GPU that has it"
    )
    max_new_tokens: int = Field(default=512, ge=1, description="maximum tokens of a sampled response")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="seed of sampling and bootstrap")
    trust_remote_code: bool = Field(default=False, description="run code that comes with a checkpoint")

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        flags, names = super().from_flags({**given, "candidate": None})
        for text in given.get("candidate") or ():
            name, path = split_name(text)
            if name is None:
                raise UserError(f"--candidate {text}: expected NAME=PATH; {NAME_RULE}")
            if (key := f"candidates.{name}") in flags:
                raise UserError(f"--candidate {text}: duplicate name `{name}`")
            flags[key], names[key] = path, "--candidate"
        return flags, names

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = beta_problems(raw.get("betas"))
        candidates = raw.get("candidates")
        if not isinstance(candidates, Mapping):
            return problems
        problems += candidate_problems(candidates)
        answering = [name for name, path in candidates.items() if isinstance(path, str) and path and answers(path)]
        if answering and raw.get("prompts") is None:
            words = f"is required: candidate `{answering[0]}` is a checkpoint; add --prompts FILE"
            problems.append(Problem(("prompts",), NO_VALUE, words))
        if not answering and raw.get("prompts") is not None:
            words = "is only read by candidates that are checkpoints, and all are files of responses: remove it"
            problems.append(Problem(("prompts",), raw["prompts"], words))
        return problems


def answers(path: str) -> bool:
    """Whether a candidate is a model to sample from, and not a file or folder of responses."""
    place = Path(path)
    if place.is_dir():
        return not any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return not place.exists() and not path.endswith(FILE_ENDINGS)


def candidate_problems(candidates: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if len(candidates) < 2:
        problems.append(Problem(("candidates",), NO_VALUE, "at least two are required: add --candidate NAME=PATH"))
    for name, path in candidates.items():
        if not ROUTE_NAME.fullmatch(str(name)):
            problems.append(Problem(("candidates", str(name)), path, NAME_RULE))
        elif path == "":
            problems.append(Problem(("candidates", name), path, "must not be empty"))
    return problems


def beta_problems(betas: Any) -> list[Problem]:
    if not isinstance(betas, tuple):
        return []
    if not betas:
        return [Problem(("betas",), (), "must not be empty: add at least one, such as betas=[0,1]")]
    problems = [
        Problem(("betas", place), beta, "must be at least 0")
        for place, beta in enumerate(betas)
        if isinstance(beta, (int, float)) and beta < 0
    ]
    if len(set(map(str, betas))) < len(betas):
        problems.append(Problem(("betas",), betas, "duplicate value: remove one"))
    return problems
