"""What runs compute is kept: losses of every step, and runs begun by earlier releases that go on to the same weights.

`python tests/dae/test_golden_runs.py` writes the losses anew; only a deliberate change of what a run computes may do
that. tests/golden/begun holds two unfinished runs of `align-shared`, one made by release 0.1.0 and one by the last
commit before the packages were split, and the weights with which that commit finished it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import golden_runs
import processes
from golden_runs import RUNS
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = GOLDEN / "losses.json"
BEGUN = GOLDEN / "begun"
TOLERANCE = 1e-4  # relative: processors and threads round otherwise, and AdamW makes whole steps of it


def losses_of(name: str, world: Path) -> list[float]:
    ended = processes.dae([*RUNS[name], "--output", name], cwd=world, proof=False)
    assert ended.status == 0, ended.err
    return golden_runs.losses(world / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_runs.make_golden_world(tmp_path_factory.mktemp("golden") / "world")


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_every_step_are_the_golden_ones(name: str, world: Path) -> None:
    golden = json.loads(LOSSES.read_text())
    assert golden.keys() == RUNS.keys()
    assert losses_of(name, world) == pytest.approx(golden[name], rel=TOLERANCE)


@pytest.mark.parametrize("release", ["before-moves", "release-0.1.0"])
def test_runs_begun_by_an_earlier_release_go_on_to_the_same_weights(release: str, tmp_path: Path) -> None:
    world = tmp_path / "world"
    shutil.copytree(BEGUN, world)
    (world / release).rename(world / "align-shared")
    ended = processes.dae([*RUNS["align-shared"], "--output", "align-shared"], cwd=world, proof=False)
    assert ended.status == 0, ended.err
    golden = json.loads(LOSSES.read_text())["align-shared"]
    assert golden_runs.losses(world / "align-shared") == pytest.approx(golden, rel=TOLERANCE)
    expected = load_file(BEGUN / "expected.safetensors")
    found = load_file(world / "align-shared" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) < 1e-5, key


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = golden_runs.make_golden_world(Path(folder) / "world")
        LOSSES.write_text(json.dumps({name: losses_of(name, made) for name in RUNS}, indent=1) + "\n")
