"""In a kernel: what a notebook shows, what an interrupt leaves, and the example."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from pico_tasks import make_suite, make_tasks
from processes import ROOT
from worlds import make_world

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "from_two_checkpoints.ipynb"
PATIENCE = 120  # seconds for a cell of a few steps
ALIGN = """\
import datasets
from dae import align
rows = {name: datasets.Dataset.from_json(f"{name}.jsonl") for name in ("shop", "general", "heldout_shop")}
def run():
    return align(
        "base", "expert", {"domain": rows["shop"], "general": rows["general"].to_list()}, output_dir="student",
        eval_dataset={"domain": rows["heldout_shop"]}, max_steps=STEPS, save_steps=0.5, logging_steps=2, rank=4,
    )
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world, and an environment for kernels."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    for name, value in {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}.items():
        monkeypatch.setenv(name, value)
    return make_world(tmp_path / "world")


def executed(cells: list[Any], folder: Path, patience: int = PATIENCE) -> list[Any]:
    """The cells after a kernel has run them in `folder`."""
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(
        notebook, timeout=patience, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return list(notebook.cells)


def outputs(cell: Any) -> list[tuple[str, Any]]:
    """(kind, content) of each output."""
    return [(one.output_type, one.get("data") or one.get("text")) for one in cell.outputs]


def test_a_run_and_a_report_show_each_thing_once(world: Path) -> None:
    """The result is proved in a fresh process, too."""
    make_suite(world / "suite.yaml", make_tasks(world / "tasks"))
    sources = [ALIGN.replace("STEPS", "8"), "result = run()\nresult", "run()"]
    sources += ["result.report('suite.yaml')", "result.metrics['loss'].tolist()"]
    sources += ["import dae\nwith_ids = [{**row, 'id': 1} for row in rows['shop']]"]
    sources += ["dae.sft('base', with_ids, output_dir='own', max_steps=2)"]
    cells = executed([nbformat.v4.new_code_cell(source) for source in sources], world)
    _, first, again, judged, table, _, warned = map(outputs, cells)
    assert [kind for kind, _ in first] == ["display_data", "execute_result"]
    html = first[0][1]["text/html"]
    assert "[8/8 " in html and [html.count(f"<td>{step}</td>") for step in (2, 4, 6, 8)] == [1, 1, 1, 1]
    assert html.count("<th>domain kl</th>") == html.count("<th>held-out domain kl</th>") == 1
    assert first[1][1]["text/plain"].startswith("TrainingResult(student, 8 steps, general/kl ")
    assert again == [first[1]]
    assert [kind for kind, _ in judged] == ["display_data", "execute_result"]
    assert "[15/15 " in judged[0][1]["text/html"]
    assert judged[1][1]["text/markdown"].startswith("## Evaluation: ")
    assert [kind for kind, _ in table] == ["execute_result"]
    assert warned[0] == ("stream", "data.train: rows of `train`: keys not read: id (120)\n")
    assert [kind for kind, _ in warned] == ["stream", "display_data", "execute_result"]
    assert "\\u001b" not in json.dumps(cells)
    assert json.loads((world / "student" / "environment.json").read_text())["command"] == ["ipykernel"]


@pytest.fixture
def kernel(world: Path) -> Iterator[tuple[Any, Any]]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(world))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupt_leaves_a_checkpoint_and_the_cell_resumes(kernel: tuple[Any, Any], world: Path) -> None:
    manager, client = kernel

    def reply_of(code: str, interrupt_when: Any = None) -> dict[str, Any]:
        number = client.execute(code)
        if interrupt_when is not None:
            give_up = time.monotonic() + PATIENCE
            while not interrupt_when():
                assert time.monotonic() < give_up, "nothing to interrupt"
                time.sleep(0.01)
            manager.interrupt_kernel()
        while True:
            reply = client.get_shell_msg(timeout=PATIENCE)
            if reply["parent_header"]["msg_id"] == number:
                return dict(reply["content"])

    def in_training() -> bool:
        metrics = world / "student" / "metrics.jsonl"
        return metrics.is_file() and '"step": 2, "loss"' in metrics.read_text()

    assert reply_of(ALIGN.replace("STEPS", "300"))["status"] == "ok"
    stopped = reply_of("result = run()", in_training)
    assert (stopped["status"], stopped["ename"]) == ("error", "Stopped")
    assert "of 300; a checkpoint is in student/checkpoints" in stopped["evalue"]
    assert list((world / "student" / "checkpoints").glob("step-*"))
    assert not (world / "student" / "run.json").exists()
    begun = time.monotonic()  # the kernel's own handler is back
    sleeping = reply_of("import time; time.sleep(60)", lambda: time.monotonic() > begun + 1)
    assert sleeping["ename"] == "KeyboardInterrupt"
    assert reply_of("result = run(); assert result.summary['steps'] == 300")["status"] == "ok"


def test_the_example_is_committed_without_outputs() -> None:
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all((cell.outputs, cell.execution_count) == ([], None) for cell in code)


def test_the_example_runs(world: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLE, as_version=4)
    (tmp_path / "empty").mkdir()
    cells = executed(list(notebook.cells), tmp_path / "empty", patience=1200)
    shown = [one for cell in cells if cell.cell_type == "code" for one in outputs(cell)]
    assert sum("image/png" in data for kind, data in shown if kind != "stream") == 2
    assert [data["text/markdown"][:15] for _, data in shown if "text/markdown" in data] == ["## Evaluation: "]
    assert not [data for kind, data in shown if kind == "stream"]
    assert str(tmp_path) not in json.dumps(cells)
