"""Mistakes from outside: one message with place and remedy, status 2 (or 4), no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pico import make_checkpoint, make_tokenizer
from processes import Signal, dae
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from worlds import align_command, make_adapter, make_world, metrics_of

from kd.runs.checkpoints import checkpoint_fault

SFT = ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "student", "train.max_steps=4"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture
def world(origin: Path, tmp_path: Path) -> Path:
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    config = place / "expert" / "adapter_config.json"  # its base is the one beside it, whatever happens to that
    config.write_text(config.read_text().replace(str(origin), str(place)))
    return place


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(arguments: Sequence[str], world: Path, *told: str, lines: int = 1) -> str:
    """Run a command that must be refused with one message; returns it."""
    before = contents(world)
    ended = dae(arguments, world)
    assert ended.status == 2, ended
    assert ended.out == ""
    for words in told:
        assert words in ended.err
    assert ended.err.startswith(f"dae {arguments[0]}: ")
    assert ended.err.count("\n") == lines, ended.err
    assert contents(world) == before
    return ended.err


# -- damages -----------------------------------------------------------------------------------------------------------


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def poison(weights: Path, value: float) -> str:
    """Put one NaN or infinity into a safetensors file; returns the tensor's name."""
    tensors = load_file(weights)
    name = max(tensors)
    tensors[name].view(-1)[0] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    return name


def other_tokenizer(folder: Path) -> None:
    """The same vocabulary with two tokens exchanged."""
    written = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def no_causal_model(folder: Path) -> None:
    make_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')


def no_tokenizer(folder: Path) -> None:
    make_checkpoint(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()


def prompt_tuning(world: Path) -> None:
    shutil.copytree(world / "expert", world / "wrong")
    (world / "wrong" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def provenance_of_another_base(world: Path) -> None:
    """An expert from `dae sft` on a base of the same shape and another content."""
    make_checkpoint(world / "other", seed=5)
    ended = dae(["sft", "--base", "other", *SFT[3:-2], "made", "train.max_steps=1"], world, proof=False)
    assert ended.status == 0, ended.err


@dataclass(frozen=True)
class Case:
    """What is wrong with the world, the command, and what the message must say."""

    damage: Callable[[Path], object]
    told: tuple[str, ...]
    more: tuple[str, ...] = ()
    arguments: tuple[str, ...] = tuple(align_command())


def nothing(_world: Path) -> None:
    pass


ROWS = {
    "missing file": Case(lambda w: (w / "shop.jsonl").unlink(), ("shop.jsonl: no such file or folder",)),
    "empty file": Case(lambda w: (w / "shop.jsonl").write_text("\n"), ("shop.jsonl: has no rows",)),
    "broken JSON in row 7": Case(
        lambda w: replace_line(w / "shop.jsonl", 7, '{"prompt": "a", "completion": '),
        ("shop.jsonl:7: not valid JSON (Expecting value, column 30)",),
    ),
    "not UTF-8": Case(
        lambda w: (w / "shop.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
        ("shop.jsonl:2: not UTF-8", "save the file as UTF-8"),
    ),
    "unknown field": Case(
        lambda w: replace_line(w / "shop.jsonl", 3, '{"question": "a", "answer": "b"}'),
        ("shop.jsonl:3: its keys are question, answer", '{"prompt": "...", "completion": "..."}'),
    ),
    "unknown role": Case(
        lambda w: replace_line(
            w / "shop.jsonl", 2, '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}'
        ),
        ("shop.jsonl:2: messages[1].role: 'bot': unknown role", "assistant"),
    ),
    "chat rows without a template": Case(
        lambda w: (w / "shop.jsonl").write_text(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        ),
        ("shop.jsonl:1", "data.chat_template"),
    ),
    "no response tokens": Case(
        lambda w: (w / "shop.jsonl").write_text('{"prompt": "one two three four five", "completion": "six"}\n' * 5),
        ("shop.jsonl: none of its 5 rows", "data.max_length (6)"),
        ("data.max_length=6",),
    ),
    "held-out rows missing": Case(nothing, ("no.jsonl: no such file",), ("data.eval.domain=no.jsonl",)),
    "a folder that `datasets` did not write": Case(
        lambda w: (w / "rows").mkdir(), ("rows: a folder without data files; give",), ("data.domain=rows",)
    ),
    "more rows in a step than in an epoch": Case(
        nothing,
        ("data.general: general.jsonl: 120 rows at a share of 0.9", "fewer than the 4096 of one optimizer step"),
        ("train.per_device_train_batch_size=4096", "train.max_steps=-1"),
    ),
}

MODELS = {
    "no such expert": Case(nothing, ("gone: no such folder",), ("expert=./gone",)),
    "an adapter of another architecture": Case(
        lambda w: make_adapter(w / "wrong", make_checkpoint(w / "gpt2", "gpt2")),
        ("expert.domain wrong/adapter_config.json: ", "trained on another base"),
        ("expert=wrong",),
    ),
    "an adapter of another shape": Case(
        lambda w: make_adapter(w / "wrong", make_checkpoint(w / "wide", hidden_size=32)),
        ("expert.domain wrong: ", "trained on another base"),
        ("expert=wrong",),
    ),
    "an adapter from another base": Case(
        provenance_of_another_base,
        ("expert.domain made: this adapter was trained on another base", "--base"),
        ("expert=made",),
    ),
    "an expert that is no causal language model": Case(
        lambda w: no_causal_model(w / "wrong"),
        ("wrong: cannot be read as a causal language model",),
        ("expert=wrong",),
    ),
    "an expert with another tokenizer": Case(
        lambda w: other_tokenizer(make_checkpoint(w / "wrong")),
        ("expert.domain wrong: its tokenizer differs from that of base ('a' is token",),
        ("expert=wrong",),
    ),
    "an expert with more tokens": Case(
        lambda w: make_tokenizer(300).save_pretrained(make_checkpoint(w / "wrong", vocab_size=300)),
        ("expert.domain wrong: its tokenizer differs from that of base", "tokens against"),
        ("expert=wrong",),
    ),
    "an expert without a tokenizer": Case(
        lambda w: no_tokenizer(w / "wrong"),
        ("expert.domain wrong: no tokenizer found", "copy the base's tokenizer files"),
        ("expert=wrong",),
    ),
    "prompt tuning": Case(
        prompt_tuning,
        ("expert.domain wrong: a PROMPT_TUNING adapter", "merge it"),
        ("expert=wrong",),
    ),
    "NaN in an expert adapter": Case(
        lambda w: poison(w / "expert" / "adapter_model.safetensors", float("nan")),
        ("expert: ", "NaN"),
    ),
    "infinity in a full expert": Case(
        lambda w: poison(make_checkpoint(w / "wrong") / "model.safetensors", float("inf")),
        ("wrong: ", "NaN"),
        ("expert=wrong",),
    ),
    "NaN in the base": Case(lambda w: poison(w / "base" / "model.safetensors", float("nan")), ("base: ", "NaN")),
    "torn weights": Case(
        lambda w: (w / "base" / "model.safetensors").write_bytes((w / "base" / "model.safetensors").read_bytes()[:-9]),
        ("base/model.safetensors: has ", "save or download it again"),
    ),
    "pickled weights": Case(
        lambda w: pickled(w / "base"),
        ("base: its weights are pickled (pytorch_model.bin)", "convert them"),
    ),
    "a config that is no JSON": Case(
        lambda w: (w / "base" / "config.json").write_text("{"),
        ("base/config.json: is no JSON",),
    ),
    "a base that is an adapter": Case(nothing, ("base: expert: is an adapter",), ("base=expert",)),
    "an expert's run that has not finished": Case(
        lambda w: dae([*SFT[:-2], "half", SFT[-1]], w, signals=[Signal("kd.stages.run_stage:publish")]),
        ("half: this run has not finished",),
        ("expert=half",),
    ),
    "layers that the base does not have": Case(
        nothing, ("lora.target_modules: ",), ("lora.target_modules=[nonsense]",)
    ),
    "a student to go on from of another kind": Case(
        nothing, ("student_from: base: is a full checkpoint", "set `lora: null`"), ("student_from=base",)
    ),
}

COMMANDS = {
    "unknown key": Case(nothing, ("temprature=2: unknown key; did you mean `temperature`?",), ("temprature=2",)),
    "unknown training argument": Case(nothing, ("did you mean `learning_rate`?",), ("train.learning_rat=1e-3",)),
    "wrong type": Case(nothing, ("seed=many: expected an integer",), ("seed=many",)),
    "wrong type of a training argument": Case(nothing, ("train.max_steps=ten: expected ",), ("train.max_steps=ten",)),
    "out of range": Case(nothing, ("lambda", "1.5"), ("lambda=1.5",)),
    "owned by the toolkit": Case(nothing, ("train.output_dir=x: ", "`output`"), ("train.output_dir=x",)),
    "an optimizer that is not installed": Case(
        nothing, ("train: ", "schedulefree"), ("train.optim=schedule_free_adamw",)
    ),
    "a schedule without its settings": Case(
        nothing, ("train: ", "min_lr"), ("train.lr_scheduler_type=cosine_with_min_lr",)
    ),
    "no device to choose": Case(nothing, ("train.use_cpu=true: ",), ("train.use_cpu=true",)),
    "neither experts nor rows": Case(
        nothing, ("add --data PATH",), arguments=("sft", "--base", "base", "--output", "o")
    ),
    "general rows unknown": Case(
        nothing,
        ("add --general-data PATH",),
        arguments=("align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl"),
    ),
    "general rows by the flag of domains": Case(
        nothing,
        ("--domain-data general=x.jsonl: `general` is the reference's route",),
        ("--domain-data", "general=x.jsonl"),
    ),
    "no such recipe": Case(nothing, ("no.yaml: ",), ("--recipe", "no.yaml")),
    "a recipe that is no YAML": Case(
        lambda w: (w / "r.yaml").write_text("base: [\n"), ("r.yaml:",), ("--recipe", "r.yaml")
    ),
}


@pytest.mark.parametrize("name", [*COMMANDS, *ROWS, *MODELS])
def test_a_mistake_is_told_once_and_nothing_is_written(name: str, world: Path) -> None:
    case = {**COMMANDS, **ROWS, **MODELS}[name]
    case.damage(world)
    refused([*case.arguments, *case.more], world, *case.told)


def test_all_mistakes_of_a_recipe_are_told_at_once(world: Path) -> None:
    (world / "r.yaml").write_text("sed: 1\nlora: {alpha: big}\ntrain: {warmup_ratio: 0.1}\n")
    told = refused(align_command("--recipe", "r.yaml", "lambda=2"), world, lines=5)
    for words in (
        "r.yaml:1: sed",
        "did you mean `seed`?",
        "r.yaml:2: lora.alpha",
        "r.yaml:3: train.warmup_ratio",
        "lambda=2",
    ):
        assert words in told


def test_rows_that_are_dropped_are_not_a_mistake_while_others_are_left(world: Path) -> None:
    with (world / "shop.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one " * 400, "completion": "two"}) + "\n")
    ended = dae(align_command("data.max_length=64", "train.max_steps=2"), world, proof=False)
    assert ended.status == 0, ended.err


# -- the place that is written to --------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a small file system of its own, or gives it other options."""
    place = tmp_path / "mounted"
    place.mkdir()
    is_mounted = False

    def mount(options: str) -> Path:
        nonlocal is_mounted
        options = f"remount,{options}" if is_mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"mounting a small file system needs root: {done.stderr.strip()}")
        is_mounted = True
        return place

    yield mount
    if is_mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_place(world: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("ro")
    told = refused(align_command(output=str(place / "student")), world, str(place))
    assert "read-only file system" in told.lower()


def test_a_run_whose_place_has_become_read_only(world: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=8m")
    command = align_command(output=str(place / "student"))
    dae(command, world, proof=False, signals=[Signal("kd.training.trainer:RoutedTrainer.training_step", 6)])
    mounted("ro")
    refused(command, world, str(place))
    mounted("rw")
    assert dae(command, world, proof=False).status == 0


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_whole_checkpoint_and_the_run_goes_on(
    world: Path, mounted: Callable[[str], Path]
) -> None:
    place = mounted("size=4m")
    run = place / "student"
    command = align_command(output=str(run))
    seen = set()
    for free in (0, 8, 24, 60, 100, 140, 180, 220, 260):  # KiB
        filler = place / "filler"
        filler.write_bytes(b"")
        block = bytes(4096)
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(block)
                except OSError:
                    break
            file.truncate(max(file.tell() // 4096 * 4096 - free * 1024, 0))
        ended = dae(command, world, proof=False)
        checkpoints = sorted((run / "checkpoints").glob("step-*")) if run.exists() else []
        seen.add((ended.status, len(checkpoints)))
        assert [checkpoint_fault(one) for one in checkpoints] == [None] * len(checkpoints)
        if ended.status == 0:
            break
        assert ended.status == 4, ended
        message = ended.err.splitlines()[-1]
        assert message.startswith("dae align: ")
        assert "the disk is full" in message
        assert "same command" in message
        assert "Traceback" not in ended.err
        assert not (run / "run.json").exists()
        filler.unlink()
    filler.unlink(missing_ok=True)
    assert {(4, 0), (4, 1)} <= seen or {(4, 0), (4, 2)} <= seen, seen
    ended = dae(command, world, proof=False)
    assert ended.status == 0, ended.err
    assert dae(align_command(), world, proof=False).status == 0
    weights = [folder / "adapter_model.safetensors" for folder in (run, world / "student")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [line["step"] for line in metrics_of(run)] == [line["step"] for line in metrics_of(world / "student")]
