"""Every command that writes an output: how it is started, killed, given otherwise, and what it has written by then."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmark_files import make_alpaca, make_mt_bench
from golden_runs import RUNS, make_golden_world
from pico import make_tokenizer
from processes import Ended, Running, Signal, dae
from stage_forks import Forks
from transformers import LlamaConfig, LlamaForSequenceClassification

REWARD_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
TRAIN = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
STAGES = {
    "expert": {"stage": "sft", "base": "base", "data": {"train": "shop.jsonl"}, "lora": {"rank": 4}, "train": TRAIN}
}
URL = "JUDGE_URL"
JUDGE = ("--judge-prompts", "judge_prompts.jsonl", "--judge-url", URL, "--judge-model", "a-judge", "--concurrency", "1")


@dataclass(frozen=True)
class Case:
    """One command.

    command: without its output. kill: a moment when something is kept. other: words that change a setting; told: how
    the refusal names it. forget: removes from the record what earlier releases did not write down. kept: files that a
    command which goes on does not write anew. finished: what it says when it is given again. suffix: of an output that
    is a file. held_before_finish: whether what was killed is held to its settings.
    """

    command: tuple[str, ...]
    kill: Signal
    other: tuple[str, ...]
    told: str
    forget: Callable[[Path], None] | None
    kept: tuple[str, ...] = ()
    finished: str = ""
    output: str = "--output={}"
    suffix: str = ""
    held_before_finish: bool = True
    forks: bool = False


def without_keys(values: dict[str, Any], *keys: str) -> None:
    """Remove dotted keys, all of which are there."""
    for key in keys:
        *way, last = key.split(".")
        place = values
        for part in way:
            place = place[part]
        del place[last]


def forget_in_json(name: str, *keys: str) -> Callable[[Path], None]:
    def forget(output: Path) -> None:
        content = json.loads((output / name).read_text())
        without_keys(content, *keys)
        (output / name).write_text(json.dumps(content))

    return forget


def forget_in_recipe(*keys: str) -> Callable[[Path], None]:
    """As release 0.1.0: keys are missing, and the tokens of the rows were not recorded."""

    def forget(output: Path) -> None:
        recipe = yaml.safe_load((output / "recipe.yaml").read_text())
        without_keys(recipe, *keys)
        (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        provenance = json.loads((output / "provenance.json").read_text())
        for source in (source for sources in provenance["data"].values() for source in sources):
            del source["encoded"]
        (output / "provenance.json").write_text(json.dumps(provenance))

    return forget


def forget_in_rows(output: Path) -> None:
    partial = output.with_name(output.name + ".partial")
    first, *batches = partial.read_text().splitlines()
    settings = json.loads(first)
    without_keys(settings, "temperature", "content of tokenizer and chat template")
    partial.write_text("\n".join([json.dumps(settings), *batches]) + "\n")


STEP = Signal("kd.training.trainer:RoutedTrainer.training_step", 8)  # two rows' batches to a step: after a checkpoint
DONE = "already finished; nothing to do"
OLD_DATA = ("data.special_tokens", "data.empty_responses", "data.allow_lossy_tokenizer")
CANDIDATES = tuple(word for name in ("big", "near") for word in ("--candidate", f"{name}={name}.jsonl"))


def training(run: str) -> Case:
    told, forget = "seed: 0 -> 3", forget_in_recipe("router_aux_loss", *OLD_DATA)
    return Case(RUNS[run], STEP, ("seed=3",), told, forget, ("provenance.json",), DONE)


CASES: Mapping[str, Case] = {
    "sft": training("sft"),
    "distill": training("distill"),
    "align": training("align-shared"),
    "merge": Case(
        ("merge", "weights", "--method", "dare_ties", "--base", "base", "--expert", "expert"),
        Signal("dae.merging.checkpoints:write_merge_card"),
        ("seed=3",),
        "seed: 0 -> 3",
        forget_in_recipe("seed"),
        finished="nothing to do",
        held_before_finish=False,
    ),
    "rank-teachers": Case(
        ("rank-teachers", "--student", "base", "--reward-model", "rm", *CANDIDATES, "shift=true"),
        Signal("os:replace", 2, name="near.json"),
        ("max_length=100",),
        "max_length: 2048 -> 100",
        forget_in_json("settings.json", "reward_chat_template", "seed", "tokenizer of student"),
        ("settings.json", "rewards/big.json"),
        finished="all numbers",
    ),
    "sample": Case(
        ("sample", "--model", "base", "--prompts", "shop.jsonl", "--rows", "4", "max_new_tokens=4"),
        Signal("dae.sampling.sample:SampleFile.finish"),
        ("seed=3",),
        "seed: 0 -> 3",
        forget_in_rows,
        finished="nothing to do",
        suffix=".jsonl",
    ),
    "run": Case(
        ("run", "path.yaml"),
        Signal("dae.pipeline.state:PipelineFolder.finish"),
        ("stages.expert.lora.rank=2",),
        "expert: lora.rank: 4 -> 2",
        forget_in_json(
            "pipeline.json",
            "stages.expert.settings.router_aux_loss",
            "stages.expert.settings.data.special_tokens",
            "stages.expert.inputs.tokenizer of base",
        ),
        ("expert/provenance.json", "expert/run.json"),
        finished="expert (sft): already done",
        output="output={}",
        forks=True,
    ),
    "eval tasks": Case(
        ("eval", "tasks", "--model", "expert", "--suite", "suite.yaml"),
        Signal("dae_eval.evaluation:run_task", 3),
        ("--model", "base"),
        'model.path: "expert" -> "base"',
        None,
        ("documents/*.gz",),
        finished="All answers are in",
        held_before_finish=False,
    ),
    "eval mt-bench": Case(
        (
            "eval", "mt-bench", "--answers", "ours.jsonl", "--questions", "question.jsonl", "--references",
            "reference.jsonl", *JUDGE,
        ),
        Signal("dae_eval.judging.asking:append_lines", 4),
        ("--judge-max-tokens", "100"),
        "judge max tokens: 2048 -> 100",
        forget_in_json("settings.json", "judge max tokens", "judge temperature"),
        ("settings.json", "replies/judgments.jsonl"),
        finished="all 8 judgments",
    ),
    "eval alpaca-eval": Case(
        ("eval", "alpaca-eval", "--outputs", "ours.json", "--baseline", "theirs.json", *JUDGE),
        Signal("dae_eval.judging.asking:append_lines", 4),
        ("--judge-max-tokens", "100"),
        "judge max tokens: 2048 -> 100",
        forget_in_json("settings.json", "judge max tokens", "order by seed"),
        ("settings.json", "replies/annotations.jsonl"),
        finished="win rate",
    ),
}  # fmt: skip


def make_reward_model(folder: Path, sign: float = 1.0, **config: Any) -> None:
    """A pico reward model; its rewards are positive here, those of the other sign negative."""
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**shape, "vocab_size": 288, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 2} | config
    model = LlamaForSequenceClassification(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
        model.score.weight.mul_(sign)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REWARD_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_claims_world(folder: Path) -> Path:
    """All that the commands are given."""
    make_alpaca(make_mt_bench(make_golden_world(folder)))
    make_reward_model(folder / "rm")
    for name in ("big", "near"):
        rows = [{"prompt": f"How big is {n}?", "completion": f" {name} {n}"} for n in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "path.yaml").write_text(yaml.safe_dump({"output": "runs", "stages": STAGES}, sort_keys=False))
    return folder


@dataclass
class Commands:
    """The commands in their world; what was killed once is copied for each test that starts from there."""

    world: Path
    url: str

    def words(self, case: Case, output: str, *more: str) -> list[str]:
        words = [word.replace(URL, self.url) for word in case.command]
        return [*words, *more, case.output.format(output)]

    def run(self, case: Case, output: str, *more: str, signals: Sequence[Signal] = ()) -> Ended:
        armed: list[Any] = [Forks(), *signals] if case.forks else [*signals]
        return dae(self.words(case, output, *more), self.world, signals=armed, proof=False)

    def start_and_stop(self, case: Case, output: str) -> Running:
        """The command, stopped where it would be killed."""
        armed: list[Any] = [Forks()] if case.forks else []
        armed.append(replace(case.kill, number=signal.SIGSTOP))
        running = Running(self.words(case, output), self.world, signals=armed, proof=False)
        while not running.is_stopped():
            assert running.process.is_alive(), running.end()
            time.sleep(0.02)
        return running

    def killed(self, name: str, output: str) -> Path:
        """An output that the command was killed over."""
        case, origin = CASES[name], f"killed-{name.replace(' ', '-')}{CASES[name].suffix}"
        if not written(self.world / origin):
            ended = self.run(case, origin, signals=[case.kill])
            assert ended.status == -signal.SIGKILL, ended
        return self._copy(origin, output)

    def finished(self, name: str, output: str) -> Path:
        """A copy of an output with which the command has finished."""
        return self._copy(self.finished_once(name).name, output)

    def finished_once(self, name: str) -> Path:
        """That output itself."""
        case, origin = CASES[name], f"finished-{name.replace(' ', '-')}{CASES[name].suffix}"
        if not written(self.world / origin):
            ended = self.run(case, origin)
            assert ended.status == 0, ended
        return self.world / origin

    def held_to_its_settings(self, name: str, output: str) -> Path:
        """An output with which no other settings can go on."""
        return (self.killed if CASES[name].held_before_finish else self.finished)(name, output)

    def _copy(self, origin: str, output: str) -> Path:
        for place in written(self.world / origin):
            to = place.with_name(place.name.replace(origin, output))
            shutil.copytree(place, to) if place.is_dir() else shutil.copy2(place, to)
        return self.world / output


def written(output: Path) -> list[Path]:
    """The output, and what lies beside one that is a file."""
    return sorted(place for place in output.parent.iterdir() if place.name.lstrip(".").startswith(output.name))


def contents(output: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of an output by its name: time of writing and content; a lock is touched by whoever looks."""
    places = [file for place in written(output) for file in (place, *place.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(output.parent)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in places
        if not file.name.endswith(".lock")
    }
