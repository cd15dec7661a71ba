"""MT-Bench by FastChat's protocol: answers of two turns, judged one by one or in pairs, and their scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dae_eval.folders import digest
from dae_eval.judging.asking import Reply, ReplyLog, Request
from dae_eval.judging.authors import Author, answer_questions, first_of, notes_of, refuse_missing
from dae_eval.judging.fastchat_files import (
    Answers,
    Judgment,
    PairJudgment,
    Question,
    answer_lines,
    judgment_lines,
    local_file,
    read_answers,
    read_judge_prompts,
    read_questions,
)
from dae_eval.judging.judged_folder import REPLIES, claimed
from dae_eval.judging.judges import JudgeChoice, ask_judge
from dae_eval.judging.mt_bench_prompts import (
    NEED_REFERENCE,
    Material,
    Mode,
    pair_judgments,
    pair_requests,
    places,
    prompt_for,
    single_judgments,
    single_requests,
)
from dae_eval.judging.mt_bench_results import (
    Asked,
    Judged,
    Result,
    finish,
    judgments_of,
    pair_judgments_of,
    smallest_margin,
)
from dae_eval.judging.mt_bench_scores import Place
from dae_eval.judging.readings import LONGER, TRUNCATED, rating_of, verdict_of
from dae_eval.results import Kind, ModelFacts
from kd.errors import UserError
from kd.runs.files import file_sha256, write_text_durably

logger = logging.getLogger("dae")

# Questions whose reference answers in FastChat's file are reported to be wrong.
REPORTED_WRONG = (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)
ANSWERS, ANSWERS_AGAINST = "answers.jsonl", "answers-against.jsonl"

ReferencesKind = Literal["original", "corrected"]


@dataclass(frozen=True)
class Side:
    """A model and its answers: the author writes them, or they are read from `file` (FastChat's format)."""

    author: Author | None
    file: Path | None = None

    def settings(self) -> dict[str, Any]:
        """All that the answers depend on except the questions."""
        if self.file is not None:
            return {"answers": file_sha256(self.file)}
        assert self.author is not None
        return self.author.settings()

    def facts(self) -> ModelFacts:
        """The model; without an author it is identified by the file of its answers."""
        if self.author is not None:
            return self.author.facts()
        assert self.file is not None
        return ModelFacts(str(self.file), file_sha256(self.file))

    def answers(self, questions: Sequence[Question], log: Path, copy: Path) -> tuple[Answers, tuple[str, ...]]:
        """The answers, also written to `copy` in FastChat's format, and notes on how the author was asked."""
        if self.file is not None:
            answers = read_answers(self.file)
            refuse_missing(answers, questions, str(self.file))
            if self.file.resolve() != copy.resolve():
                write_text_durably(copy, self.file.read_text(encoding="utf-8-sig"))
            return answers, ()
        assert self.author is not None
        answers, tstamps, notes = answer_questions(self.author, questions, ReplyLog(log))
        write_text_durably(copy, answer_lines(answers, tstamps))
        return answers, notes


@dataclass(frozen=True)
class MtBench:
    """One run of the benchmark. Files are paths or `hub:OWNER/NAME/FILE`.

    against: the other model in pairwise mode. price: per million tokens (in, out). only_estimate: do not ask the judge.
    """

    side: Side
    judge: JudgeChoice
    questions: str
    judge_prompts: str
    output: Path
    references: str | None = None
    references_kind: ReferencesKind = "original"
    against: Side | None = None
    repeat: int = 1
    strict: bool = True
    kind: Kind = "general"
    price: tuple[float, float] | None = None
    only_estimate: bool = False

    @property
    def mode(self) -> Mode:
        return "single" if self.against is None else "pairwise"


def run_mt_bench(job: MtBench) -> Result | None:
    """Answer, judge, score and write the evaluation; the same command resumes an interrupted run.

    Returns:
        The scores and their folder; None if only the estimate is wanted.

    Raises:
        UserError: a flag or file is invalid, the folder was started with different settings, the endpoint refuses the
            request, or judgments are missing in strict mode.
        MachineError: an endpoint cannot be reached or keeps failing. Replies so far are kept.
    """
    material = read_material(job)
    judged_by = {
        "mode": job.mode,
        **job.judge.settings(),
        "judge prompts": material.hashes["judge prompts"],
        "references": job.references_kind if material.hashes["references"] else None,
        "references' file": material.hashes["references"],
    }
    sides = {"": job.side.settings()} | ({"against: ": job.against.settings()} if job.against else {})
    settings = {"questions": material.hashes["questions"], **judged_by}
    settings |= {f"{whose}{key}": value for whose, part in sides.items() for key, value in part.items()}
    with claimed(job.output, settings):
        answers, against, notes = _answers(job, material)
        replies = _ask_judge(job, material, answers, against)
        if replies is None:
            return None
        notes = (*notes, *notes_of(job.judge.name, replies), *_reference_note(job, material))
        described = Asked(
            facts=job.side.facts(),
            questions=material.questions,
            references=material.references,
            answers=answers,
            settings={**judged_by, "repeats": job.repeat},
            conditions={**settings, "notes": list(notes)},
            against=None if against is None else against.model_id,
        )
        judged = _judged(job, material, answers, against, replies)
        return finish(job.output, described, judged, strictly=job.strict, kind=job.kind)


@dataclass(frozen=True)
class FinishedJudgments:
    """Existing judgments: one file for each repeat, in FastChat's format.

    model_id: needed if a file holds several models. side: the model and its answers, if a report should show them.
    """

    files: tuple[str, ...]
    questions: str
    output: Path
    mode: Mode = "single"
    model_id: str | None = None
    side: Side | None = None
    strict: bool = True
    kind: Kind = "general"


def score_judgments(job: FinishedJudgments) -> Result:
    """Scores and evaluation from existing judgments; no judge is asked.

    Raises:
        UserError: a file is invalid, or judgments are missing in strict mode.
    """
    questions_file = local_file(job.questions, "--questions")
    questions = read_questions(questions_file)
    files = [local_file(file, "--judgments") for file in job.files]
    hashes = [file_sha256(file) for file in files]
    answers = None
    if job.side is not None and job.side.file is not None:
        answers = read_answers(job.side.file)
        refuse_missing(answers, questions, str(job.side.file))
    found = [
        judgments_of(file, job.model_id) if job.mode == "single" else pair_judgments_of(file, job.model_id)
        for file in files
    ]
    names = {(one.model, one.against) for one in found}
    if len(names) > 1:
        raise UserError(f"--judgments: the files judge different models ({names}); give repeats for one model")
    first, judges = found[0], {judgment.judge for judgment in found[0].judgments}
    settings = {"questions": file_sha256(questions_file), "judgments": hashes, "model id": first.model}
    asked = Asked(
        facts=ModelFacts(first.model, digest(settings)) if job.side is None else job.side.facts(),
        questions=tuple(questions),
        references={},
        answers=answers,
        settings={
            "mode": job.mode,
            "judge": sorted({judge for judge, _ in judges}),
            "prompts": sorted({prompt for _, prompt in judges}),
            "repeats": len(files),
        },
        conditions=settings,
        against=first.against,
    )
    judged = Judged(tuple(job.files), tuple(one.judgments for one in found))
    with claimed(job.output, settings):
        return finish(job.output, asked, judged, strictly=job.strict, kind=job.kind)


def read_material(job: MtBench) -> Material:
    """Questions, prompts and references. Raises UserError if they do not fit together."""
    questions_file = local_file(job.questions, "--questions")
    prompts_file = local_file(job.judge_prompts, "--judge-prompts")
    references_file = None if job.references is None else local_file(job.references, "--references")
    questions = read_questions(questions_file)
    references = {} if references_file is None else read_answers(references_file).turns
    lacking = [q.id for q in questions if q.category in NEED_REFERENCE and len(references.get(q.id, ())) < len(q.turns)]
    if lacking:
        raise UserError(
            f"{job.references or '--references'}: {len(lacking)} questions of {', '.join(NEED_REFERENCE)} lack a "
            f"reference answer ({first_of(lacking)}); give FastChat's reference_answer file with --references"
        )
    hashes = {
        "questions": file_sha256(questions_file),
        "judge prompts": file_sha256(prompts_file),
        "references": None if references_file is None else file_sha256(references_file),
    }
    material = Material(tuple(questions), read_judge_prompts(prompts_file), references, job.judge_prompts, hashes)
    for question, turn in places(questions):
        prompt_for(question, turn, job.mode, material)
    return material


def _answers(job: MtBench, material: Material) -> tuple[Answers, Answers | None, tuple[str, ...]]:
    replies = job.output / REPLIES
    answers, notes = job.side.answers(material.questions, replies / ANSWERS, job.output / ANSWERS)
    if job.against is None:
        return answers, None, notes
    copy = job.output / ANSWERS_AGAINST
    against, more = job.against.answers(material.questions, replies / ANSWERS_AGAINST, copy)
    if against.model_id == answers.model_id:
        # FastChat's pairwise files tell the two models apart by name alone.
        against = replace(against, model_id=f"{against.model_id}-against")
    return answers, against, (*notes, *more)


def _ask_judge(job: MtBench, material: Material, answers: Answers, against: Answers | None) -> dict[str, Reply] | None:
    """The judge's reply to every request, or None if only the estimate is wanted."""
    repeats = range(1, job.repeat + 1)
    requests = [request for repeat in repeats for request in _requests(job, material, answers, against, repeat)]
    log = ReplyLog(job.output / REPLIES / "judgments.jsonl")
    margin = smallest_margin(len(material.questions), job.mode)
    is_rated = _is_rated(job.mode, job.strict)
    return ask_judge(job.judge, requests, log, "judgments", job.price, job.only_estimate, is_rated, margin)


def _requests(
    job: MtBench, material: Material, answers: Answers, against: Answers | None, repeat: int
) -> list[Request]:
    if against is None:
        return single_requests(job.judge, material, answers, repeat)
    return pair_requests(job.judge, material, answers, against, repeat)


def _judged(
    job: MtBench, material: Material, answers: Answers, against: Answers | None, replies: Mapping[str, Reply]
) -> Judged:
    """The judgments of each repeat, also written as files of FastChat's format."""
    files, repeats, problems = [], list[Sequence[Judgment | PairJudgment]](), list[Mapping[Place, str]]()
    for repeat in range(1, job.repeat + 1):
        requests = _requests(job, material, answers, against, repeat)
        found: Sequence[Judgment | PairJudgment]
        if against is None:
            found, why = single_judgments(job.judge, material, answers, repeat, requests, replies, job.strict)
        else:
            found, why = pair_judgments(job.judge, material, answers, against, repeat, requests, replies, job.strict)
        files.append(job.output / f"judgments-{repeat}.jsonl")
        write_text_durably(files[-1], judgment_lines(found))
        repeats.append(found)
        problems.append(why)
    remedy = "run the same command to ask the judge again"
    if any(problem == TRUNCATED for why in problems for problem in why.values()):
        remedy += f" ({LONGER})"
    return Judged(tuple(map(str, files)), tuple(repeats), tuple(problems), remedy)


def _is_rated(mode: Mode, strictly: bool) -> Callable[[Reply], bool]:
    if mode == "single":
        return lambda reply: not rating_of(reply, strictly)[1]
    return lambda reply: not verdict_of(reply, "model_1", "model_2", strictly)[1]


def _reference_note(job: MtBench, material: Material) -> list[str]:
    wrong = [q.id for q in material.questions if q.category in NEED_REFERENCE and q.id in REPORTED_WRONG]
    if job.references_kind == "corrected" or not wrong:
        return []
    return [f"{len(wrong)} of FastChat's original reference answers are reported to be wrong: {wrong}"]
