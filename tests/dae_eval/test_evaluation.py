"""Models asked from beginning to end: one backbone, no number asked twice, none mixed up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dae_eval.evaluation
import dae_eval.models
import pytest
import torch
from dae_eval.evaluation import evaluate
from dae_eval.folders import read_evaluation
from dae_eval.models import locate
from dae_eval.results import Evaluation
from dae_eval.suites import load_suite
from lossy_tokenizers import make_lossy_checkpoint
from peft import PeftModel
from pico import make_checkpoint, make_tokenizer
from pico_tasks import make_suite, make_tasks
from transformers import AutoModelForCausalLM, GenerationConfig
from worlds import make_adapter, make_rows

from kd.errors import MachineError, UserError
from kd.runs.files import file_sha256


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, two adapters on it, the first one merged, another full checkpoint; tasks."""
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(folder / "base")
    make_checkpoint(folder / "other", seed=5)
    make_adapter(folder / "expert", folder / "base", seed=1)
    make_adapter(folder / "student", folder / "base", seed=2)
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "expert")
    merged.merge_and_unload().save_pretrained(folder / "merged")
    make_tokenizer().save_pretrained(folder / "merged")
    make_tasks(folder / "tasks")
    make_rows(folder / "heldout.jsonl", 3, 6)
    return folder


def ask(world: Path, output: Path, models: Mapping[str, str], **suite: Any) -> dict[str, Evaluation]:
    """Evaluate models of the world into OUTPUT/ROLE."""
    output.mkdir(exist_ok=True)
    located = {role: locate(role, str(world / name), None) for role, name in models.items()}
    loaded = load_suite(make_suite(output / "suite.yaml", world / "tasks", **suite))
    return evaluate(located, loaded, {role: output / role for role in models}, ["dae", "eval", "tasks"])


class Counted:
    """Counts calls of a function in a module, and lets them through or forbids them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls: list[Any] = []
        real = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls.append(arguments)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, counted)


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {task: (result.documents, result.settings) for task, result in evaluation.tasks.items()}


def test_four_roles_are_answered_by_one_backbone_and_equal_weights_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Counted(monkeypatch, dae_eval.models, "load_model")
    runs = Counted(monkeypatch, dae_eval.evaluation, "run_task")
    found = ask(
        world,
        tmp_path,
        {"base": "base", "expert": "expert", "reference": "base", "again": "expert", "student": "student"},
    )
    assert len(loads.calls) == 1 and len(runs.calls) == 3 * 5
    assert found["base"] is found["reference"] and found["expert"] is found["again"]
    answers = [numbers(found[role]) for role in ("base", "expert", "student")]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base", "expert", "student"]
    for role in ("base", "expert", "student"):
        assert read_evaluation(tmp_path / role) == found[role]


def test_full_checkpoints_are_in_memory_one_at_a_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Counted(monkeypatch, dae_eval.models, "load_model")
    freed = Counted(monkeypatch, dae_eval.models.Memory, "free")
    ask(world, tmp_path, {"base": "base", "student": "other", "expert": "expert"})
    assert [source.folder.name for source, _ in loads.calls] == ["base", "other"]
    assert len(freed.calls) == 3


def test_an_adapter_answers_on_the_backbone_as_its_merged_copy(world: Path, tmp_path: Path) -> None:
    found = ask(world, tmp_path, {"base": "base", "student": "student", "expert": "expert", "merged": "merged"})
    assert numbers(found["expert"]) == numbers(found["merged"]) != numbers(found["base"])


def test_what_is_finished_is_not_asked_again_and_no_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"general": [str(world / "heldout.jsonl")], "domain": [str(world / "heldout.jsonl")]}
    models = {"reference": "base", "expert": "expert", "student": "student"}
    first = ask(world, tmp_path, models, held_out=rows)
    files = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file() and path.name != "suite.yaml"}
    monkeypatch.setattr(dae_eval.models, "load_model", None)
    assert ask(world, tmp_path, models, held_out=rows) == first
    assert {path: path.stat().st_ino for path in files} == files
    by_route = {line.route: line for line in first["student"].held_out}
    assert set(by_route["general"].kl) == {"reference"} and set(by_route["domain"].kl) == {"reference", "expert"}
    assert min([*by_route["general"].kl.values(), *by_route["domain"].kl.values()]) > 0
    assert {line.route: line.kl for line in first["expert"].held_out}["domain"]["expert"] == pytest.approx(0, abs=1e-6)


def test_a_stop_between_two_tasks_costs_nothing_that_was_finished(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(world, tmp_path / "whole", {"model": "expert"})
    real, calls = dae_eval.evaluation.run_task, []

    def stopped(harness: Any, task: Any, *rest: Any) -> Any:
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(harness, task, *rest)

    monkeypatch.setattr(dae_eval.evaluation, "run_task", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(world, tmp_path / "stopped", {"model": "expert"})
    with pytest.raises(UserError, match="not finished"):
        read_evaluation(tmp_path / "stopped" / "model")
    assert ask(world, tmp_path / "stopped", {"model": "expert"})["model"].tasks == whole["model"].tasks
    assert len(calls) == 6


def test_other_settings_are_asked_anew_and_old_answers_stay(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(world, tmp_path, {"model": "base"})["model"]
    runs = Counted(monkeypatch, dae_eval.evaluation, "run_task")
    smaller = ask(world, tmp_path, {"model": "base"}, batch_size=3)["model"]
    assert len(runs.calls) == 5 and smaller.conditions["batch_size"] == 3
    one = [{"task": "shop_choose", "shots": 1, "limit": 4}, "shop_say"]
    limited = ask(world, tmp_path, {"model": "base"}, groups={"domain": one})["model"]
    assert len(runs.calls) == 6
    assert [len(task.documents) for task in limited.tasks.values()] == [4, 12]
    assert limited.tasks["shop_say"] == plain.tasks["shop_say"]
    assert read_evaluation(tmp_path / "model") == limited
    assert ask(world, tmp_path, {"model": "base"})["model"].tasks == plain.tasks
    assert len(runs.calls) == 6


def test_changed_documents_are_asked_anew(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = make_tasks(tmp_path / "tasks")
    ask(world, tmp_path, {"model": "base"}, include=str(tasks))
    lines = (tasks / "shop.jsonl").read_text().splitlines(keepends=True)
    (tasks / "shop.jsonl").write_text("".join([*lines[:-1], lines[-1].replace("What", "Say what")]))
    runs = Counted(monkeypatch, dae_eval.evaluation, "run_task")
    ask(world, tmp_path, {"model": "base"}, include=str(tasks))
    assert len(runs.calls) == 2  # of the shop only


def test_sources_and_seen_rows_are_looked_up_without_asking_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(world, tmp_path, {"model": "base"})["model"].tasks["shop_choose"]
    monkeypatch.setattr(dae_eval.models, "load_model", None)
    entry = {"task": "shop_choose", "cluster_by": "source", "leak_by": "source"}
    groups = {"domain": [entry]}
    clustered = ask(world, tmp_path, {"model": "base"}, groups=groups)["model"].tasks["shop_choose"]
    assert len({document.cluster for document in plain.documents}) == 12
    assert len({document.cluster for document in clustered.documents}) == 4
    assert [document.score for document in clustered.documents] == [document.score for document in plain.documents]
    assert read_evaluation(tmp_path / "model").tasks["shop_choose"] == clustered


def test_documents_in_the_rows_of_the_model_s_run_are_marked(world: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "as PAGE 2  says"}) + "\n")
    run = make_checkpoint(tmp_path / "run", seed=9)
    told = {"toolkit": "dae-align", "stage": "sft", "base": {"path": "b", "fingerprint": "0"}, "inputs": {"base": "0"}}
    source = {"path": str(tmp_path / "rows.jsonl"), "sha256": file_sha256(tmp_path / "rows.jsonl"), "share": 1.0}
    (run / "provenance.json").write_text(json.dumps({**told, "data": {"train": [source]}}))
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    suite = load_suite(
        make_suite(
            tmp_path / "s.yaml", world / "tasks", groups={"domain": [{"task": "shop_choose", "leak_by": "source"}]}
        )
    )
    found = evaluate({"model": locate("model", str(run), None)}, suite, {"model": tmp_path / "out"})["model"]
    assert [document.seen for document in found.tasks["shop_choose"].documents] == [n // 3 == 2 for n in range(12)]
    assert [(rows.path, rows.problem) for rows in found.training_rows] == [(source["path"], "")]
    assert found.training == ({"step": 3, "loss": 1.5},) and found.model.inputs == {"base": "0"}


def test_models_never_share_numbers_and_a_folder_is_one_model_s(world: Path, tmp_path: Path) -> None:
    ask(world, tmp_path, {"model": "base"})
    before = sorted(path.name for path in (tmp_path / "model" / "documents").iterdir())
    with pytest.raises(UserError, match=r"model\.path: .*base.* -> .*other"):
        ask(world, tmp_path, {"model": "other"})
    with pytest.raises(UserError, match=r"model\.fingerprint: "):
        ask(world, tmp_path, {"model": "expert"})
    (tmp_path / "model" / "evaluation.json").unlink()  # as a stop would leave it
    other = ask(world, tmp_path, {"model": "other"})["model"]
    assert other.tasks == ask(world, tmp_path / "fresh", {"model": "other"})["model"].tasks
    after = sorted(path.name for path in (tmp_path / "model" / "documents").iterdir())
    assert set(before) < set(after) and len(after) == 2 * len(before)


def test_settings_for_generation_in_a_checkpoint_change_nothing(world: Path, tmp_path: Path) -> None:
    talkative = make_checkpoint(tmp_path / "talkative")
    GenerationConfig(max_new_tokens=1, do_sample=True, temperature=5.0, eos_token_id=2).save_pretrained(talkative)
    model = locate("model", str(talkative), None)
    suite = load_suite(make_suite(tmp_path / "suite.yaml", world / "tasks"))
    found = evaluate({"model": model}, suite, {"model": tmp_path / "out"})["model"]
    assert numbers(found) == numbers(ask(world, tmp_path / "plain", {"model": "base"})["model"])


def test_the_chat_template_is_chosen_and_recorded(world: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]")
    chatting = ask(world, tmp_path / "a", {"model": "base"}, chat_template=str(template))["model"]
    plain = ask(world, tmp_path / "b", {"model": "base"})["model"]
    for task, result in chatting.tasks.items():
        assert all(document.prompt.startswith("[user]") for document in result.documents)
        assert result.settings["chat_template_sha256"] == file_sha256(template)
        assert plain.tasks[task].settings["chat_template_sha256"] is None
        assert [document.hash for document in result.documents] == [d.hash for d in plain.tasks[task].documents]
    with pytest.raises(UserError, match=r"^chat_template: true: .*base "):
        ask(world, tmp_path / "c", {"model": "base"}, chat_template=True)
    with pytest.raises(UserError, match=r"^chat_template: .*none\.jinja: "):
        ask(world, tmp_path / "d", {"model": "base"}, chat_template=str(tmp_path / "none.jinja"))
    own = make_checkpoint(tmp_path / "own")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.read_text()
    tokenizer.save_pretrained(own)
    suite = load_suite(make_suite(tmp_path / "own.yaml", world / "tasks", chat_template=True))
    by_own = evaluate({"model": locate("model", str(own), None)}, suite, {"model": tmp_path / "e"})["model"]
    assert numbers(by_own) == numbers(chatting)


def test_mistakes_are_found_before_any_weights(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dae_eval.models, "load_model", None)
    for suite, words in (
        ({"max_length": 100_000}, "max_length: 100000"),
        ({"groups": {"domain": ["shop_choose", {"task": "shop_say", "metric": "bleu"}]}}, "metric: 'bleu'"),
        ({"held_out": {"general": ["nowhere.jsonl"]}}, "nowhere.jsonl"),
    ):
        with pytest.raises(UserError, match=words):
            ask(world, tmp_path, {"model": "base", "student": "student"}, **suite)
    with pytest.raises(UserError, match=f"{world / 'nowhere'}: "):
        locate("--student", str(world / "nowhere"), None)
    with pytest.raises(UserError, match=f"^--student .*base {world / 'student'} "):
        locate("--student", str(world / "expert"), str(world / "student"))


def test_nothing_of_a_task_is_written_whose_likelihoods_are_not_numbers(world: Path, tmp_path: Path) -> None:
    """The weights are finite; their logits overflow."""
    model: Any = AutoModelForCausalLM.from_pretrained(world / "base")
    with torch.no_grad():
        model.lm_head.weight.copy_(3e38 * model.lm_head.weight.sign())
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    for task in ("shop_choose", "shop_say", "shop_go_on"):
        output = tmp_path / task
        with pytest.raises(UserError, match=rf"^{tmp_path / 'broken'}: task {task}: document \d+: .*NaN"):
            ask(world, output, {"model": str(tmp_path / "broken")}, groups={"domain": [task]})
        assert [path for path in output.rglob("*") if path.is_file()] == [output / "suite.yaml"]


def test_losses_are_shown_in_their_own_unit_and_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "answer"}
    tasks = make_tasks(tmp_path / "tasks", rolling=rolling)
    groups = {"domain": ["shop_choose"], "texts": {"kind": "shown", "tasks": [{"task": "rolling", "limit": 5}]}}
    found = ask(world, tmp_path, {"model": "base"}, include=str(tasks), groups=groups)["model"]
    result = found.tasks["rolling"]
    assert (result.kind, result.metric, result.unit, result.total) == ("shown", "bits_per_byte", "bits per byte", 12)
    assert [document.weight for document in result.documents] == [len(d.prompt.encode()) for d in result.documents]
    assert found.tasks["shop_choose"].total == 12 and found.tasks["shop_choose"].unit == "points"
    monkeypatch.setattr(dae_eval.models, "load_model", None)
    assert ask(world, tmp_path, {"model": "base"}, include=str(tasks), groups=groups)["model"] == found
    assert read_evaluation(tmp_path / "model") == found


def test_the_plan_is_announced_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dae_eval.models, "load_model", None)
    plans: list[Any] = []

    def announced(plan: Any) -> None:
        plans.append(plan)
        raise KeyboardInterrupt

    suite = load_suite(make_suite(tmp_path / "suite.yaml", world / "tasks"))
    models = {"model": locate("model", str(world / "base"), None)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, suite, {"model": tmp_path / "out"}, [], announced)
    assert [(name, member.metric.key) for name, member in plans[0].members.items()] == [
        ("shop_choose", "acc"),
        ("shop_say", "exact_match"),
        ("general_choose", "acc"),
        ("general_go_on", "acc"),
        ("general_say", "exact_match"),
    ]
    assert not list((tmp_path / "out").rglob("*.gz"))


def test_a_base_that_is_not_there_is_asked_for(world: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", world / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(UserError, match=r"^--model .*--base\. /gone/base"):
        locate("--model", str(adapter), None)
    assert locate("--model", str(adapter), str(world / "base")).backbone.path == str(world / "base")


def test_memory_that_runs_out_is_the_machine_s_fault(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(dae_eval.evaluation, "run_task", full)
    with pytest.raises(MachineError, match=r"shop_choose; .*batch_size=2"):
        ask(world, tmp_path, {"model": "base"})


@pytest.mark.slow  # lm-eval in a process of its own
def test_a_tokenizer_that_drops_text_of_the_documents_is_reported_once(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_lossy_checkpoint(tmp_path / "lossy")
    found = ask(world, tmp_path / "out", {"student": str(tmp_path / "lossy"), "base": "base"})
    (line,) = [record.message for record in caplog.records if "tokenizer" in record.message]
    assert line.startswith(f"{tmp_path / 'lossy'}: ") and '"tokenizer_class": "TokenizersBackend"' in line
    assert found["student"].tasks


def test_lm_eval_s_own_command_gives_the_same_scores(world: Path, tmp_path: Path) -> None:
    groups = {"domain": ["shop_choose", {"task": "shop_say", "shots": 2}], "general": ["shop_go_on", "general_choose"]}
    ours = ask(world, tmp_path, {"model": "base"}, groups=groups)["model"]
    for shots, names in ((0, ["shop_choose", "shop_go_on", "general_choose"]), (2, ["shop_say"])):
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", *names]
        command += [
            "--model_args",
            f"pretrained={world / 'base'},dtype=float32",
            "--include_path",
            str(world / "tasks"),
        ]
        command += ["--num_fewshot", str(shots), "--batch_size", "4", "--device", "cpu", "--log_samples"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        said = subprocess.run([*command, "--output_path", str(tmp_path / "theirs")], env=environment, check=False,
                              capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
        assert said.returncode == 0, said.stderr
        for name in names:
            (file,) = (tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            result = ours.tasks[name]
            assert [sample[result.metric] for sample in sorted(samples, key=lambda s: s["doc_id"])] == [
                document.score for document in result.documents
            ]
            assert {sample["doc_hash"] for sample in samples} == {document.hash for document in result.documents}
