"""`dae run`: stages in a row. Each is a command of its own; what is finished and unchanged is not run again.

A stage is done as long as its settings, the fingerprints of its inputs (earlier stages' outputs among them) and its
result are what they were when it finished. How a stage goes on after a stop is the stage's own affair
(kd/runs/run_folder.py, dae/sampling/sample.py, dae_eval/folders.py): the same command is given again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from dae.pipeline.kinds import EvalStage, ReportStage, flags_of, kinds
from dae.pipeline.recipe import Loaded, Stage, read_pipeline, recipe_text
from dae.pipeline.stage_process import Signals, run_command
from dae.pipeline.state import Fingerprints, PipelineFolder, Standing, read_state
from dae.pipeline.view import View
from kd.config.problems import NO_VALUE, Problem
from kd.errors import Stopped, UserError
from kd.runs.files import disk_errors, write_text_durably

DONE, NOT_PASSED = 0, 1
LAUNCHED = "RANK"  # torchrun and accelerate number their processes


def run_pipeline(recipe: Path, assignments: Sequence[str] = (), *, redo: bool = False) -> int:
    """Run every stage that is not done, in order; the exit status.

    redo: what was made from other settings or inputs is moved aside, with all that follows from it, and made anew.

    Returns:
        0; 1 where all is done and a report's verdict is not PASS; else the status of the first stage that failed.

    Raises:
        UserError: the recipe has mistakes (all are told, of all stages, before anything runs), or a stage has run from
            other settings or inputs and `redo` was not asked for.
        Stopped: Ctrl-C or SIGTERM; the stage under way has stopped in its own way.
    """
    if os.environ.get(LAUNCHED) is not None:
        raise UserError(
            "dae run starts one process to a stage: give it without torchrun or accelerate, or give these the command "
            "of a stage, which `dae run` prints"
        )
    loaded = read_pipeline(recipe, assignments)
    fingerprints = Fingerprints(read_state(loaded.output).get("fingerprints", {}) if loaded.output else {})
    loaded.problems += missing_inputs(loaded, fingerprints)
    folder = PipelineFolder(loaded.pipeline(), fingerprints)
    with folder.claimed():
        return run_stages(folder, redo)


def missing_inputs(loaded: Loaded, fingerprints: Fingerprints) -> list[Problem]:
    """Models, rows and suites from outside that are not there, or not in order. Reads all of them."""
    problems = []
    for draft in loaded.drafts.values():
        for one in draft.inputs:
            if one.reference is not None or one.path.startswith("@") or (one.wanted == "suite" and not draft.recipe):
                continue
            try:
                fingerprints.of(one.wanted, one.path, draft.recipe)
            except UserError as error:
                words = "; ".join(line.strip() for line in str(error).splitlines())
                problems.append(Problem(draft.key(one.key), NO_VALUE, words))
    known = {problem.key for problem in loaded.problems}
    return [problem for problem in problems if problem.key not in known]


def refuse_or_redo(folder: PipelineFolder, standings: Mapping[str, Standing], redo: bool, view: View) -> None:
    """Raise UserError where stages ran from something else; with `redo` move them and what follows aside."""
    stale = {name: standing for name, standing in standings.items() if standing.word == "stale"}
    if stale and not redo:
        raise UserError(told(stale, folder))
    for there, to in folder.move_aside(folder.with_downstream(set(stale))):
        view.say(f"{there}: moved to {to}")


def told(stale: Mapping[str, Standing], folder: PipelineFolder) -> str:
    """What has changed, stage by stage, and what to do."""
    lines = [f"  {name}: {reason}" for name, standing in stale.items() for reason in standing.reasons]
    again = ", ".join(stage.name for stage in folder.with_downstream(set(stale)))
    remedy = f"Give the same command with --redo to move {again} aside and run again, or undo the change."
    return "\n".join([f"{folder.path}: was started with different settings (recorded -> current):", *lines, remedy])


def run_stages(folder: PipelineFolder, redo: bool) -> int:
    """Run what is not done; the exit status."""
    signals, view = Signals(), View(folder.pipeline.stages)
    refuse_or_redo(folder, folder.standings(), redo, view)
    done: set[str] = set()
    status = DONE
    with signals.noted(), view:
        for stage in folder.pipeline.stages:
            standing = folder.standing(stage, done)
            refuse_or_redo(folder, {stage.name: standing}, redo, view)  # an earlier one may have come out otherwise
            if standing.word == "done":
                view.already(stage)
                verdict = folder.records[stage.name].verdict
            else:
                code = run_stage(folder, stage, view, signals)
                is_verdict = code == NOT_PASSED and kinds()[stage.kind].gives == "report"
                if code != DONE and not is_verdict:
                    status = failed(stage, code, view, signals)
                    break
                verdict = folder.finish(stage)
                view.end(stage, "done", verdict or "")
            if verdict is not None:
                view.rows[stage.name].note = verdict
                status = status if verdict == "PASS" else NOT_PASSED
            done.add(stage.name)
    view.summary()
    return status


def run_stage(folder: PipelineFolder, stage: Stage, view: View, signals: Signals) -> int:
    """Give one stage's command; its exit status."""
    if signals.received is not None:
        raise stopped(stage.name, signals.received)
    folder.begin(stage)
    write_recipe(folder, stage)
    command = command_of(folder, stage)
    view.begin(stage, ["dae", *command])
    return run_command(command, view.line, signals, view.width)


def failed(stage: Stage, code: int, view: View, signals: Signals) -> int:
    """What is said of a stage that did not finish; its exit status. Raises Stopped where it was told to stop."""
    number = code - 128
    if signals.received is not None and number == signals.received:
        view.end(stage, "stopped")
        raise stopped(stage.name, number)
    if number in (signal.SIGINT, signal.SIGTERM):
        note = "stopped by a signal; the same command goes on from there"
    elif number > 0:
        note = f"killed by signal {number}; where memory ran out, make its steps smaller; the same command goes on"
    else:
        note = f"exit status {code}; the same command goes on from here"
    view.end(stage, "failed", note)
    return code


def stopped(stage: str, number: int) -> Stopped:
    """Ctrl-C and SIGTERM."""
    return Stopped(number, f"stopped at stage {stage}; the same command goes on from there")


def write_recipe(folder: PipelineFolder, stage: Stage) -> None:
    """Put down the resolved recipe that the stage's command reads."""
    if isinstance(stage.recipe, (EvalStage, ReportStage)):
        return
    path, text = folder.recipe_path(stage), recipe_text(stage)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text_durably(path, text)


def command_of(folder: PipelineFolder, stage: Stage) -> list[str]:
    """The stage's own command, without the word `dae`."""
    words = [*kinds()[stage.kind].command]
    if isinstance(stage.recipe, (EvalStage, ReportStage)):
        return [*words, *flags_of(stage.recipe)]
    return [*words, "--recipe", str(folder.recipe_path(stage))]
