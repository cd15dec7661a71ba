"""`dae run`: runs stages in order, each as a command of its own; finished, unchanged stages are skipped.

A stage is done if its settings, the fingerprints of its inputs (including earlier stages' outputs) and its result are
unchanged since it finished. A stopped stage resumes by itself when its command runs again (kd/runs/run_folder.py,
dae/sampling/sample.py, dae_eval/folders.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from dae.pipeline.kinds import kinds
from dae.pipeline.recipe import Loaded, Stage, read_pipeline
from dae.pipeline.stage_process import Signals, run_command
from dae.pipeline.state import Fingerprints, PipelineFolder, Standing, read_state
from dae.pipeline.view import View
from kd.config.loading import resolved_yaml
from kd.config.problems import NO_VALUE, Problem
from kd.errors import Stopped, UserError
from kd.runs.files import disk_errors, write_text_durably

DONE, NOT_PASSED = 0, 1
LAUNCHED = "RANK"  # torchrun and accelerate number their processes


def run_pipeline(recipe: Path, assignments: Sequence[str] = (), *, redo: bool = False) -> int:
    """Run every stage that is not done, in order; the exit status.

    redo: move aside results made from other settings or inputs, and all that depend on them, and run them again.

    Returns:
        0; 1 if a report's verdict is not PASS; else the status of the first stage that failed.

    Raises:
        UserError: the recipe is invalid (one message for all stages, before anything runs), or a stage was run with
            other settings or inputs, without `redo`.
        Stopped: Ctrl-C or SIGTERM; the running stage has stopped in its own way.
    """
    if os.environ.get(LAUNCHED) is not None:
        raise UserError(
            "dae run cannot run under torchrun or accelerate; launch a stage's command with them (`dae run` prints it)"
        )
    loaded = read_pipeline(recipe, assignments)
    fingerprints = Fingerprints(read_state(loaded.output).get("fingerprints", {}) if loaded.output else {})
    loaded.problems += missing_inputs(loaded, fingerprints)
    folder = PipelineFolder(loaded.pipeline(), fingerprints)
    with folder.claimed():
        return run_stages(folder, redo)


def missing_inputs(loaded: Loaded, fingerprints: Fingerprints) -> list[Problem]:
    """External models, rows and suites that are missing or invalid. Reads all of them."""
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
    """Raise UserError if stages are stale; with `redo`, move them and all that depend on them aside."""
    stale = {name: standing for name, standing in standings.items() if standing.word == "stale"}
    downstream = folder.with_downstream(set(stale))
    if stale and not redo:
        lines = [f"  {name}: {reason}" for name, standing in stale.items() for reason in standing.reasons]
        again = ", ".join(stage.name for stage in downstream)
        title = f"{folder.path}: was started with different settings (recorded -> current):"
        remedy = f"Add --redo to move {again} aside and run again, or undo the change."
        raise UserError("\n".join([title, *lines, remedy]))
    for there, to in folder.move_aside(downstream):
        view.write(f"{there}: moved to {to}")


def run_stages(folder: PipelineFolder, redo: bool) -> int:
    signals, view = Signals(), View(folder.pipeline.stages)
    refuse_or_redo(folder, folder.standings(), redo, view)
    done: set[str] = set()
    status = DONE
    with signals.noted(), view:
        for stage in folder.pipeline.stages:
            standing = folder.standing(stage, done)
            refuse_or_redo(folder, {stage.name: standing}, redo, view)  # an earlier stage's result may have changed
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
    """Run one stage's command; its exit status."""
    if signals.received is not None:
        raise stopped(stage.name, signals.received)
    folder.begin(stage)
    write_recipe(folder, stage)
    command = command_of(folder, stage)
    view.begin(stage, ["dae", *command])
    return run_command(command, view.line, signals, view.width)


def failed(stage: Stage, code: int, view: View, signals: Signals) -> int:
    """Report a stage that did not finish; its exit status. Raises Stopped if the user stopped it."""
    number = code - 128
    if signals.received is not None and number == signals.received:
        view.end(stage, "stopped")
        raise stopped(stage.name, number)
    if number in (signal.SIGINT, signal.SIGTERM):
        note = "stopped by a signal; run the same command to resume"
    elif number > 0:
        note = f"killed by signal {number}, perhaps out of memory; run the same command to resume"
    else:
        note = f"exit status {code}; run the same command to resume"
    view.end(stage, "failed", note)
    return code


def stopped(stage: str, number: int) -> Stopped:
    return Stopped(number, f"stopped at stage {stage}; run the same command to resume")


def write_recipe(folder: PipelineFolder, stage: Stage) -> None:
    """Write the resolved recipe, if the stage's command reads one."""
    if kinds()[stage.kind].command_line is not None:
        return
    path, text = folder.recipe_path(stage), resolved_yaml(stage.recipe)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text_durably(path, text)


def command_of(folder: PipelineFolder, stage: Stage) -> list[str]:
    """The stage's own command, without the word `dae`."""
    kind = kinds()[stage.kind]
    if kind.command_line is not None:
        return [*kind.command, *kind.command_line(stage.recipe)]
    return [*kind.command, "--recipe", str(folder.recipe_path(stage))]
