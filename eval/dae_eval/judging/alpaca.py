"""AlpacaEval: outputs of a model, their annotation against a baseline's, and the win rate."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dae_eval.folders import write_evaluation
from dae_eval.judging.alpaca_scores import (
    NOT_IN_FILE,
    UNRATED,
    Annotation,
    LengthControlled,
    WinRate,
    length_controlled,
    occurrences,
    read_annotations,
    read_rows,
    text_of,
    win_rate,
)
from dae_eval.judging.asking import Reply, ReplyLog, Request
from dae_eval.judging.authors import Author, answer_instructions, notes_of, seed_of
from dae_eval.judging.fastchat_files import Winner, local_file, read_judge_prompts
from dae_eval.judging.judged_folder import REPLIES, claimed, software
from dae_eval.judging.judges import JudgeChoice, ask_judge, chosen_prompt, judge_request
from dae_eval.judging.readings import LONGER, TRUNCATED, verdict_of
from dae_eval.results import Document, Evaluation, Kind, ModelFacts, TaskResult
from kd.errors import UserError
from kd.runs.files import file_sha256, json_text, write_text_durably

logger = logging.getLogger("dae")

PROMPT = "pair-v2"  # of the judge prompts: two answers to one question
OUTPUTS, ANNOTATIONS, SCORES = "outputs.json", "annotations.json", "scores.json"
GROUP = "alpaca-eval"
# The winner where A or B is, by whether the model's output (2) is shown as A.
_SHOWN: Mapping[bool, tuple[Winner, Winner]] = {True: ("model_2", "model_1"), False: ("model_1", "model_2")}
_PREFERENCES = {"model_1": 1.0, "model_2": 2.0, "tie": 1.5, "error": None}


@dataclass(frozen=True)
class Annotating:
    """How outputs are annotated. baseline: a file of outputs. seed: of the order in which a pair is shown.

    price: per million tokens (in, out). only_estimate: do not ask the judge.
    """

    judge: JudgeChoice
    judge_prompts: str
    baseline: str
    seed: int = 0
    price: tuple[float, float] | None = None
    only_estimate: bool = False


@dataclass(frozen=True)
class AlpacaEval:
    """One run. outputs: a file of existing outputs; without it the author answers `instructions`.

    annotations: a file of finished annotations, which needs neither outputs nor a judge. gamed_file numbers the
    `instructions`.
    """

    output: Path
    author: Author | None = None
    instructions: str | None = None
    outputs: str | None = None
    annotations: str | None = None
    annotating: Annotating | None = None
    gamed_file: Path | None = None
    kind: Kind = "general"


@dataclass(frozen=True)
class AlpacaResult:
    output: Path
    rate: WinRate
    length_controlled: LengthControlled
    annotator: str
    duplicates: int


@dataclass(frozen=True)
class Outputs:
    generator: str
    rows: tuple[Mapping[str, Any], ...]


def run_alpaca_eval(job: AlpacaEval) -> AlpacaResult | None:
    """Write outputs, annotate them and score, as far as the job says; the same command resumes an interrupted run.

    Returns:
        The rates; None without a judge, or if only the estimate is wanted.

    Raises:
        UserError: a flag or file is invalid, or the folder was started with different settings.
        MachineError: an endpoint cannot be reached or keeps failing. Replies so far are kept.
    """
    if job.annotations is not None:
        path = local_file(job.annotations, "--annotations")
        with claimed(job.output, {"annotations": file_sha256(path)}):
            return _finish(job, read_annotations(path), {}, {"annotations": file_sha256(path)}, path)
    settings = _settings(job)
    with claimed(job.output, settings):
        outputs, notes = _outputs(job)
        if job.annotating is None:
            logger.info("%s: %d outputs of %s", job.output / OUTPUTS, len(outputs.rows), outputs.generator)
            return None
        found = _annotate(job.annotating, outputs, job.output)
        if found is None:
            return None
        annotated, more = found
        path = job.output / ANNOTATIONS
        write_text_durably(path, json.dumps(annotated, indent=1, ensure_ascii=False) + "\n")
        judged_by = {key: value for key, value in settings.items() if key.startswith(("judge", "baseline", "order"))}
        return _finish(job, read_annotations(path), judged_by, {**settings, "notes": [*notes, *more]}, path)


def _settings(job: AlpacaEval) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if job.outputs is not None:
        settings["outputs"] = file_sha256(local_file(job.outputs, "--outputs"))
    elif job.author is not None and job.instructions is not None:
        settings["instructions"] = file_sha256(local_file(job.instructions, "--instructions"))
        settings |= {**job.author.settings(), "temperature": 0.0}
    else:
        raise UserError("alpaca-eval: --annotations, --outputs, or --model with --instructions is required")
    if job.annotating is not None:
        how = job.annotating
        settings |= how.judge.settings()
        settings["judge prompts"] = file_sha256(local_file(how.judge_prompts, "--judge-prompts"))
        settings["baseline"] = file_sha256(local_file(how.baseline, "--baseline"))
        settings["order by seed"] = how.seed
    return settings


def _outputs(job: AlpacaEval) -> tuple[Outputs, tuple[str, ...]]:
    """The outputs, also written in AlpacaEval's format, and notes on how the author was asked."""
    notes: tuple[str, ...] = ()
    if job.outputs is not None:
        outputs = read_outputs(local_file(job.outputs, "--outputs"), "--outputs")
    else:
        assert job.author is not None and job.instructions is not None
        path = local_file(job.instructions, "--instructions")
        asked = read_rows(path, "--instructions")
        texts = [text_of(row, "instruction", f"{path}: row {index}") for index, row in enumerate(asked)]
        written, notes = answer_instructions(job.author, texts, 0.0, ReplyLog(job.output / REPLIES / "outputs.jsonl"))
        rows = tuple(
            {"dataset": row.get("dataset", ""), "instruction": instruction, "output": output,
             "generator": job.author.model_id}
            for row, instruction, output in zip(asked, texts, written, strict=True)
        )  # fmt: skip
        outputs = Outputs(job.author.model_id, rows)
    write_text_durably(job.output / OUTPUTS, json.dumps(list(outputs.rows), indent=1, ensure_ascii=False) + "\n")
    return outputs, notes


def read_outputs(path: Path, flag: str) -> Outputs:
    """The outputs of one model. Raises UserError if the file is invalid or has outputs of several models."""
    rows = read_rows(path, flag)
    for index, row in enumerate(rows):
        for key in ("instruction", "output", "generator"):
            text_of(row, key, f"{flag} {path}: row {index}")
    generators = {row["generator"] for row in rows}
    if len(generators) > 1:
        raise UserError(f"{flag} {path}: outputs of several models ({', '.join(sorted(generators))}); expected one")
    return Outputs(generators.pop(), tuple(rows))


# -- annotation --------------------------------------------------------------------------------------------------------


def _annotate(how: Annotating, outputs: Outputs, folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]] | None:
    """Annotations in AlpacaEval's format and notes, or None if only the estimate is wanted."""
    baseline = _matched(read_outputs(local_file(how.baseline, "--baseline"), "--baseline"), outputs, how.baseline)
    requests = annotation_requests(how, outputs, baseline)
    log = ReplyLog(folder / REPLIES / "annotations.jsonl")
    replies = ask_judge(how.judge, requests, log, "annotations", how.price, how.only_estimate, _has_verdict)
    if replies is None:
        return None
    annotated = [
        _annotation_row(how, index, row, other, baseline.generator, replies[str(index)])
        for index, (row, other) in enumerate(zip(outputs.rows, baseline.rows, strict=True))
    ]
    return annotated, notes_of(how.judge.name, replies)


def _has_verdict(reply: Reply) -> bool:
    return not verdict_of(reply, "model_1", "model_2", strictly=True)[1]


def _matched(baseline: Outputs, outputs: Outputs, source: str) -> Outputs:
    """The baseline's outputs in the order of the model's, joined by instruction; of duplicates the n-th to the n-th.

    Raises:
        UserError: the baseline has no output for an instruction.
    """
    by_instruction: dict[str, list[Mapping[str, Any]]] = {}
    for row in baseline.rows:
        by_instruction.setdefault(row["instruction"], []).append(row)
    missing = [index for index, row in enumerate(outputs.rows) if row["instruction"] not in by_instruction]
    if missing:
        raise UserError(
            f"--baseline {source}: outputs are missing for {len(missing)} of {len(outputs.rows)} instructions (first: "
            f"row {missing[0]}); give the baseline's outputs for the same instructions"
        )
    matched, seen = [], Counter[str]()
    for row in outputs.rows:
        same = by_instruction[row["instruction"]]
        matched.append(same[min(seen[row["instruction"]], len(same) - 1)])
        seen[row["instruction"]] += 1
    return Outputs(baseline.generator, tuple(matched))


def shown_first(seed: int, index: int) -> bool:
    return bool(seed_of(seed, index) & 1)


def annotation_requests(how: Annotating, outputs: Outputs, baseline: Outputs) -> list[Request]:
    """One request per instruction, with the two outputs in the order that the seed gives."""
    prompts = read_judge_prompts(local_file(how.judge_prompts, "--judge-prompts"))
    prompt = chosen_prompt(prompts, PROMPT, "pairwise", how.judge_prompts)
    requests = []
    for index, (row, other) in enumerate(zip(outputs.rows, baseline.rows, strict=True)):
        first, second = (row, other) if shown_first(how.seed, index) else (other, row)
        fields = {"question": row["instruction"], "answer_a": first["output"], "answer_b": second["output"]}
        requests.append(judge_request(how.judge, prompt, str(index), fields, how.judge_prompts))
    return requests


def _annotation_row(
    how: Annotating, index: int, row: Mapping[str, Any], other: Mapping[str, Any], baseline: str, reply: Reply
) -> dict[str, Any]:
    ours_first = shown_first(how.seed, index)
    first, second = _SHOWN[ours_first]
    winner, problem = verdict_of(reply, first, second, strictly=True)
    annotated = {
        "instruction": row["instruction"],
        "dataset": row.get("dataset") or other.get("dataset", ""),
        "output_1": other["output"],
        "generator_1": baseline,
        "output_2": row["output"],
        "generator_2": row["generator"],
        "annotator": f"{how.judge.name}, {PROMPT}",
        "preference": _PREFERENCES[winner],
        "shown_first": row["generator"] if ours_first else baseline,
        "raw_completion": reply.text,
    }
    return {**annotated, UNRATED: problem} if problem else annotated


# -- results -----------------------------------------------------------------------------------------------------------


def _finish(
    job: AlpacaEval,
    annotations: Sequence[Annotation],
    judged_by: Mapping[str, Any],
    conditions: Mapping[str, Any],
    path: Path,
) -> AlpacaResult:
    annotators = sorted({annotation.annotator for annotation in annotations})
    rate = win_rate(annotations)
    controlled = length_controlled(annotations, job.gamed_file, _order(job))
    duplicates = sum(occurrence > 0 for occurrence in occurrences(annotations))
    result = AlpacaResult(job.output, rate, controlled, ", ".join(annotators), duplicates)
    scores = {**asdict(rate), "length_controlled": asdict(controlled), "annotator": annotators}
    write_text_durably(job.output / SCORES, json_text(scores))
    facts = ModelFacts(str(path), file_sha256(path)) if job.author is None else job.author.facts()
    settings = {"annotator": annotators, "baseline's name": annotations[0].baseline, **judged_by}
    write_evaluation(job.output, evaluation_of(annotations, facts, settings, conditions, job.kind))
    return result


def _order(job: AlpacaEval) -> list[str] | None:
    """The instructions in the order of --instructions, if given."""
    if job.instructions is None:
        return None
    path = local_file(job.instructions, "--instructions")
    rows = enumerate(read_rows(path, "--instructions"))
    return [text_of(row, "instruction", f"{path}: row {index}") for index, row in rows]


def evaluation_of(
    annotations: Sequence[Annotation],
    facts: ModelFacts,
    settings: Mapping[str, Any],
    conditions: Mapping[str, Any],
    kind: Kind,
) -> Evaluation:
    """One document for each preference, scored preference - 1.

    Its identity is its data set and instruction, not its place: the files of two models may differ in their order. Of
    duplicates the n-th is the same document in both.
    """
    task = TaskResult(
        task="alpaca_eval",
        group=GROUP,
        kind=kind,
        metric="preference - 1",
        version="2",  # 1: documents were identified by their place
        settings=settings,
        total=len(annotations),
        documents=tuple(
            _document(annotation, occurrence, annotation.preference - 1)
            for annotation, occurrence in zip(annotations, occurrences(annotations), strict=True)
            if annotation.preference is not None
        ),
    )
    return Evaluation(facts, {task.task: task}, {**conditions, **software()})


def _document(annotation: Annotation, occurrence: int, score: float) -> Document:
    shown = annotation.instruction
    if shown is None:  # identified by its place
        number, identity = annotation.index, f"{annotation.dataset} {annotation.index}"
        digest = cluster = hashlib.sha256(identity.encode()).hexdigest()
    else:
        identity = json.dumps([annotation.dataset, shown, occurrence])
        digest, cluster = (hashlib.sha256(text.encode()).hexdigest() for text in (identity, shown))
        number = int(digest[:8], 16)
    return Document(
        id=number,
        hash=digest,
        score=score,
        prompt=f"({NOT_IN_FILE})" if shown is None else shown,
        target="",
        answer=f"({NOT_IN_FILE})" if annotation.output is None else annotation.output,
        cluster=cluster,
        category=annotation.dataset,
    )


def result_lines(result: AlpacaResult) -> list[str]:
    """The result for a terminal of 80 columns."""
    rate, controlled = result.rate, result.length_controlled
    error = "" if rate.standard_error is None else f" +- {rate.standard_error:.4f} (standard error)"
    if controlled.win_rate is None:
        length_line = f"none: {controlled.missing}"
    else:
        length_line = f"{controlled.win_rate:.4f} % +- {controlled.standard_error:.4f} (standard error)"
    mean, baseline_mean = (
        NOT_IN_FILE if one is None else f"{one:.0f} characters" for one in (rate.mean_length, rate.baseline_mean_length)
    )
    lines = [
        f"  win rate           {rate.win_rate:.4f} %{error}",
        f"  length-controlled  {length_line}",
        f"  mean length        {mean} (baseline: {baseline_mean})",
        f"  {rate.preferences} preferences: {rate.wins} wins, {rate.losses} losses, {rate.ties} ties",
        f"  annotator          {result.annotator}",
    ]
    if result.duplicates:
        lines.append(f"  {result.duplicates} duplicate instructions, paired in the order of the file")
    if rate.dropped:
        lines.append(f"  left out: {rate.dropped} without a preference")
        lines += [f"    {count} {problem}" for problem, count in rate.unrated.items()]
    return [*lines, f"  {LONGER}"] if TRUNCATED in rate.unrated else lines
