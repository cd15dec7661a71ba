"""The messages that users meet most, word by word, in one file: tests/golden/messages.txt.

Other tests assert the key and the exit status. `python tests/dae/test_messages.py` writes the file anew; read its diff.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from pico import make_checkpoint, make_tokenizer
from worlds import make_world

from dae import cli

SNAPSHOT = Path(__file__).parents[1] / "golden" / "messages.txt"
SFT = ("sft", "--base", "base", "--data", "shop.jsonl", "--output", "out")
ALIGN = ("align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl", "--general-data",
         "general.jsonl", "--output", "out")  # fmt: skip
DISTILL = ("distill", "--base", "base", "--teacher", "other", "--data", "shop.jsonl", "--output", "out")

TURN = {"role": "user", "content": "?"}


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda world: (world / name).write_text(text)


def rows(*lines: object) -> Callable[[Path], object]:
    return write("shop.jsonl", "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def nothing(_world: Path) -> None:
    pass


def other_tokenizer(world: Path) -> None:
    make_tokenizer(270).save_pretrained(make_checkpoint(world / "other", seed=3))


def foreign(world: Path) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.txt").write_text("mine")


def torn(world: Path) -> None:
    weights = world / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pissa(world: Path) -> None:
    config = world / "expert" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))


# Name -> (what is done to the world first, the command).
CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "unknown command": (nothing, ("trian",)),
    "unknown flag": (nothing, ("sft", "--bose", "base")),
    "unknown key": (nothing, (*SFT, "lorra.rank=4")),
    "unknown key of train": (nothing, (*SFT, "train.lr=1e-4")),
    "argument that the toolkit sets": (nothing, (*SFT, "train.output_dir=x")),
    "argument that transformers renamed": (nothing, (*SFT, "train.evaluation_strategy=steps")),
    "value of another type": (nothing, (*SFT, "seed=three", "train.max_steps=many")),
    "value out of range": (nothing, (*ALIGN, "lambda=1.5", "beta=0.3")),
    "no rows given": (nothing, ("sft", "--base", "base", "--output", "out")),
    "shares that are not 1": (nothing, (*ALIGN, "data.general.0.share=0.5", "data.domain.0.share=0.6")),
    "early stopping without an eval set": (nothing, (*SFT, "early_stopping_patience=2")),
    "quantised weights that would train": (nothing, (*SFT, "quantization=nf4", "lora=null")),
    "merging into a quantised base": (nothing, (*SFT, "quantization=nf4", "merge=true")),
    "no such recipe": (nothing, ("sft", "--recipe", "nowhere.yaml")),
    "recipe that is no YAML": (write("r.yaml", "base: [\n"), ("sft", "--recipe", "r.yaml")),
    "key twice": (write("r.yaml", "base: base\nbase: other\n"), ("sft", "--recipe", "r.yaml")),
    "no such file": (nothing, (*SFT[:4], "nowhere.jsonl", *SFT[5:])),
    "empty file": (rows(), SFT),
    "no JSON": (rows("{"), SFT),
    "row of no known shape": (rows({"question": "?", "answer": "!"}), SFT),
    "row of another type": (rows({"prompt": "?", "completion": 7}), SFT),
    "key twice in a row": (rows('{"prompt": "a", "prompt": "b", "completion": "c"}'), SFT),
    "no response token": (rows({"prompt": "?", "completion": ""}), SFT),
    "conversation without a template": (
        rows({"messages": [TURN, {"role": "assistant", "content": "!"}]}),
        SFT,
    ),
    "no such checkpoint": (nothing, ("sft", "--base", "./nowhere", *SFT[3:])),
    "adapter as a base": (nothing, ("sft", "--base", "expert", *SFT[3:])),
    "torn weights": (torn, SFT),
    "another tokenizer": (other_tokenizer, DISTILL),
    "adapter that changes its base": (pissa, ALIGN),
    "folder with other files": (foreign, SFT),
    "output that is a file": (write("out", ""), SFT),
    "pipeline: no such stage": (
        write("p.yaml", 'output: runs\nstages: {a: {stage: align, base: base, expert: "@b"}}\n'),
        ("run", "p.yaml"),
    ),
    "report without models": (nothing, ("report", "--output", "out")),
    "report of models and evaluations": (nothing, ("report", "--from", "a", "--base", "base", "--output", "out")),
    "report of no evaluation": (nothing, ("report", "--from", "base", "--output", "out")),
    "eval tasks: suite with mistakes": (
        write("s.yaml", "groups: {extra: [a], general: {kind: shown, tasks: [a]}, domain: []}\nchat_template: 3\n"),
        ("eval", "tasks", "--model", "base", "--suite", "s.yaml", "--output", "out"),
    ),
    "mt-bench without a judge": (
        nothing,
        ("eval", "mt-bench", "--model", "base", "--questions", "q", "--judge-prompts", "p", "--output", "out"),
    ),
    "keys of an unknown stage": (nothing, ("keys", "alin")),
    "check of nothing": (nothing, ("check",)),
}


def message(name: str, folder: Path) -> str:
    """The case's exit status and what it says on stderr."""
    prepare, command = CASES[name]
    world = make_world(folder / "world")
    prepare(world)
    before = os.getcwd()
    os.chdir(world)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = cli.run(command)
    finally:
        os.chdir(before)
    return f"[{name}] status {status}\n{err.getvalue().replace(str(folder), 'FOLDER').rstrip()}\n"


def snapshot() -> dict[str, str]:
    parts = SNAPSHOT.read_text(encoding="utf-8").split("\n\n")
    return {part[1 : part.index("]")]: part.rstrip("\n") + "\n" for part in parts}


@pytest.mark.parametrize("name", CASES)
def test_messages_are_those_of_the_snapshot(name: str, tmp_path: Path) -> None:
    assert message(name, tmp_path) == snapshot()[name]


def test_the_snapshot_has_no_other_messages() -> None:
    assert list(snapshot()) == list(CASES)


if __name__ == "__main__":
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            found.append(message(case, Path(place)))
    SNAPSHOT.write_text("\n".join(found), encoding="utf-8")
