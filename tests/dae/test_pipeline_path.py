"""The recipe of the paper's whole path in miniature, smaller still."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import ROOT, dae
from stage_forks import Forks
from transformers import AutoModelForCausalLM

from dae.demo.model import save_untrained
from dae.demo.world import write_world
from kd.models.checkpoint import checkpoint


def written_at(folder: Path) -> dict[Path, int]:
    """When every file was written; locks are touched by whoever looks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_the_paper_s_path_in_miniature(tmp_path: Path) -> None:
    """recipes/demo/path.yaml as it is shipped, with two steps to a stage and a few documents."""
    folder = tmp_path / "empty"
    write_world(folder / "demo" / "world")
    save_untrained(folder / "demo" / "base", 0)
    for rows in (folder / "demo" / "world").glob("*.jsonl"):
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:64]))
    shutil.copytree(ROOT / "recipes" / "demo", folder / "demo" / "recipes")
    suite = yaml.safe_load((folder / "demo/recipes/eval.yaml").read_text())
    tasks = {"domain": "world_price", "general": "world_sorting"}
    suite["groups"] = {kind: [{"task": task, "limit": 8}] for kind, task in tasks.items()}
    (folder / "few.yaml").write_text(yaml.safe_dump(suite))
    few = [f"stages.{name}.suite.file=few.yaml" for name in ("teacher_scores", "report")]
    for name in ("expert", "teacher", "student", "aligned"):
        few += [f"stages.{name}.train.max_steps=2", f"stages.{name}.train.per_device_train_batch_size=4"]
    few.append("stages.expert.train.lr_scheduler_kwargs={num_decay_steps: 1}")
    command = ["run", "demo/recipes/path.yaml", *few]
    ended = dae(command, folder, signals=[Forks()], proof=False)  # type: ignore[list-item]
    assert ended.status == 1, ended.err
    assert "Traceback" not in ended.err and "it/s" not in ended.err
    places = {line.split()[-1] for line in ended.out.splitlines()[-8:]}
    stages = yaml.safe_load((folder / "demo/recipes/path.yaml").read_text())["stages"]
    assert places == {f"demo/path/{name}" for name in stages}
    model = AutoModelForCausalLM.from_pretrained(folder / "demo/path/aligned")
    assert (type(model).__name__, model.config.num_local_experts) == ("MixtralForCausalLM", 2)
    provenance = json.loads((folder / "demo/path/aligned/provenance.json").read_text())["inputs"]
    assert provenance["base"] == provenance["reference"] == checkpoint(folder / "demo/path/student").fingerprint
    assert provenance["expert.shop"] == checkpoint(folder / "demo/path/expert/merged").fingerprint
    before = written_at(folder / "demo/path")
    again = dae(command, folder, signals=[Forks()], proof=False)  # type: ignore[list-item]
    assert (again.status, again.err.count("already done")) == (1, 8)
    assert written_at(folder / "demo/path") == before
