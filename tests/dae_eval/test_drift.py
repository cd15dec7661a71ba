"""Drift: what is measured is what the definition says, and measuring it leaves a run as it was."""

from __future__ import annotations

import copy
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dae_eval.drift
import numpy as np
import pytest
import torch
from dae_eval.drift import (
    HeldOutRows,
    KeptRoute,
    measure_held_out,
    read_held_out,
    sha256_of,
    spread_rows,
)
from peft import LoraConfig, PeftModel, get_peft_model
from pico import make_model
from processes import Signal
from processes import dae as dae_process
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import align_command, make_adapter, make_world, metrics_of

import dae.alignment
import kd.training.publishing
from dae import cli
from kd.config.data_recipe import DataRecipe
from kd.data.token_rows import TokenRows
from kd.errors import UserError
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.runs.files import file_sha256

TIMINGS = {"response_tokens_per_second", "peak_memory_gib"}
HELD_OUT = ("data.eval.domain=heldout_shop.jsonl", "data.eval.general=heldout_general.jsonl")
SEEDS = {STUDENT_ADAPTER: 1, "expert": 2}


# -- against the definition --------------------------------------------------------------------------------------------


def make_rows(seed: int = 0, rows: int = 7) -> TokenRows:
    """Rows of different lengths; each ends in response tokens, some have a response in the middle, too."""
    generator = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        length = int(generator.integers(4, 14))
        mask = np.zeros(length, bool)
        mask[-2:] = True
        mask[2:4] |= row % 3 == 0
        made.append((generator.integers(3, 280, length).tolist(), mask))
    return TokenRows.from_rows(made)


def add_adapter(model: nn.Module, name: str, dropout: float = 0.0) -> PeftModel:
    """An adapter of the student's or the expert's own, far from zero."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, name, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(SEEDS[name])
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if f".{name}." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double()


def make_roles(family: str, kind: str) -> tuple[Role, dict[str, Role], dict[str, nn.Module]]:
    """(student, teachers, the same three as models by themselves) for a LoRA student or one whose weights all train."""
    base = make_model(family, dtype=torch.float64)
    alone: dict[str, nn.Module] = {"reference": base, "expert": add_adapter(copy.deepcopy(base), "expert").eval()}
    if kind == "full":
        whole = copy.deepcopy(base).requires_grad_(True)
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.mul_(1.3)
        alone["student"] = copy.deepcopy(whole).eval()
        student, home = Role("student", whole, None), add_adapter(copy.deepcopy(base), "expert")
    else:
        alone["student"] = add_adapter(copy.deepcopy(base), STUDENT_ADAPTER).eval()
        lora = add_adapter(copy.deepcopy(base), STUDENT_ADAPTER, dropout=0.5)
        home = add_adapter(lora if kind == "shared" else copy.deepcopy(base), "expert")
        lora.set_adapter(STUDENT_ADAPTER)
        student = Role("student", lora, STUDENT_ADAPTER)
    student.model.train()
    return student, {"reference": Role("reference", home, None), "expert": Role("expert", home, "expert")}, alone


def defined(rows: TokenRows, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """loss, reference, expert: row by row from full logits."""
    totals = dict.fromkeys(("loss", "reference", "expert"), 0.0)
    tokens = 0
    for row in range(len(rows)):
        ids, mask = rows[row].input_ids, torch.tensor(rows[row].response_mask)[1:]
        with torch.no_grad():
            logits = {name: model(input_ids=torch.tensor([ids])).logits[0, :-1] for name, model in models.items()}
        log_TV = {name: logits_TV.log_softmax(-1) for name, logits_TV in logits.items()}
        log_p_TV = log_TV["student"]
        totals["loss"] -= float(log_p_TV[range(len(ids) - 1), ids[1:]][mask].sum())
        for name in ("reference", "expert"):
            totals[name] += float((log_TV[name].exp() * (log_TV[name] - log_p_TV)).sum(-1)[mask].sum())
        tokens += int(mask.sum())
    return {name: total / tokens for name, total in totals.items()}


def held(rows: TokenRows, route: str = "domain") -> HeldOutRows:
    return HeldOutRows(route, rows, "rows.jsonl", "0" * 64)


@pytest.mark.parametrize("kind", ["shared", "apart", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_loss_and_kl_equal_the_definition(family: str, kind: str) -> None:
    (student, teachers, alone), rows = make_roles(family, kind), make_rows()
    expected = defined(rows, alone)
    assert min(expected.values()) > 0.01
    (found,) = measure_held_out(student, [held(rows)], teachers, batch_size=3)
    assert found.tokens == int(rows.response_mask.sum())
    assert {"loss": found.loss, **found.kl} == pytest.approx(expected, rel=1e-5)
    kept = KeptRoute.ask(rows, teachers, 3)
    for _ in range(2):
        again = kept.measure(student)
        assert (again.tokens, again.loss, again.kl) == (found.tokens, found.loss, found.kl)


def test_batches_do_not_matter_and_a_model_is_no_way_from_itself() -> None:
    (student, teachers, _), rows = make_roles("llama", "shared"), make_rows()
    one, other = (measure_held_out(student, [held(rows)], teachers, batch_size=size)[0] for size in (1, 7))
    assert {"loss": one.loss, **one.kl} == pytest.approx({"loss": other.loss, **other.kl}, rel=1e-9)
    (itself,) = measure_held_out(teachers["expert"], [held(rows)], {"expert": teachers["expert"]})
    assert itself.kl == {"expert": 0.0}


def test_the_expert_is_not_asked_on_general_rows() -> None:
    student, teachers, _ = make_roles("llama", "shared")
    routes = [held(make_rows(), "general"), held(make_rows(1), "shop")]
    general, shop = measure_held_out(student, routes, teachers)
    assert (general.route, set(general.kl)) == ("general", {"reference"})
    assert (shop.route, set(shop.kl)) == ("shop", {"reference", "expert"})
    alone, _ = measure_held_out(student, routes, {})
    assert alone.kl == {}
    assert alone.loss == pytest.approx(general.loss, rel=1e-12)


def test_a_model_is_left_as_it_was() -> None:
    student, teachers, _ = make_roles("llama", "shared")

    def condition() -> tuple[Any, ...]:
        model = student.model
        modes = [module.training for module in model.modules()]
        grads = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
        return modes, grads, model.active_adapters, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = condition()
    assert any(before[0])
    measure_held_out(student, [held(make_rows())], teachers)
    KeptRoute.ask(make_rows(), teachers, 3).measure(student)
    assert condition() == before


def test_a_loss_counts_all_of_a_models_vocabulary_whoever_is_asked() -> None:
    rows, wide = make_rows(), make_model(vocab_size=320, seed=1, dtype=torch.float64)
    model, narrow = Role("wide", wide, None), Role("reference", make_model(dtype=torch.float64), None)
    (alone,), (asked,) = (measure_held_out(model, [held(rows)], t) for t in ({}, {"reference": narrow}))
    assert asked.loss == pytest.approx(alone.loss, rel=1e-12)
    shared = copy.deepcopy(wide)
    shared.resize_token_embeddings(288)
    assert alone.loss > measure_held_out(Role("cut", shared, None), [held(rows)], {})[0].loss + 1e-3
    models = {"student": shared, "reference": narrow.model, "expert": narrow.model}
    assert asked.kl["reference"] == pytest.approx(defined(rows, models)["reference"], rel=1e-7)


def test_rows_that_a_model_cannot_read_are_refused() -> None:
    small, short = make_model(vocab_size=200), make_model("gpt2", n_positions=8)
    with pytest.raises(UserError, match=r"^rows\.jsonl: .*token 2\d\d.*expert.* 200 "):
        measure_held_out(Role("base", make_model(), None), [held(make_rows())], {"expert": Role("expert", small, None)})
    with pytest.raises(UserError, match=r"^rows\.jsonl: .* 1\d tokens.*base.*max_length to 8"):
        measure_held_out(Role("base", short, None), [held(make_rows())], {})


def test_held_out_files_are_read_as_training_reads_them(origin: Path) -> None:
    settings = DataRecipe.model_validate({"max_length": 40})
    tokenizer = AutoTokenizer.from_pretrained(origin / "base")
    paths = [str(origin / f"heldout_{name}.jsonl") for name in ("general", "shop")]
    one, both = read_held_out({"general": paths[:1], "domain": paths}, tokenizer, settings)
    assert (one.route, one.path, one.sha256) == ("general", paths[0], file_sha256(paths[0]))
    assert (len(one.rows), len(both.rows), both.path) == (24, 48, ", ".join(paths))
    assert int(both.rows.lengths.max()) == 40
    assert len({both.sha256, sha256_of(paths[::-1]), *map(file_sha256, paths)}) == 4


@pytest.mark.parametrize("rows", [1, 5, 255, 256, 257, 1000])
@pytest.mark.parametrize("response", [1, 90, 400])
def test_a_curve_is_drawn_from_few_rows_all_over_the_file(rows: int, response: int) -> None:
    mask = [False] + [True] * response
    made = TokenRows.from_rows(([5] * len(mask), mask) for _ in range(rows))
    chosen = spread_rows(made, 256, 10_000)
    wanted = min(rows, 256, 10_000 // response)
    assert len(set(chosen)) == len(chosen)
    assert wanted * 0.9 <= len(chosen) <= wanted
    gaps = np.diff([*chosen, rows])
    assert gaps.max() - gaps.min() <= 1
    assert chosen[0] == 0


def test_one_row_is_measured_however_long() -> None:
    made = TokenRows.from_rows([([5] * 50, [False] + [True] * 49)] * 3)
    assert spread_rows(made, 256, 10) == [0]


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all that a run is given."""
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)
    return place


def run(*more: str, output: str = "student") -> Path:
    assert cli.run(align_command(*HELD_OUT, *more, output=output)) == 0
    return Path(output)


def drift_of(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> line of the forgetting curve; no step may have two."""
    lines = [line for line in metrics_of(folder) if any(key.startswith("drift/") for key in line)]
    by_step = {line.pop("step"): line for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def without_timings(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in metrics_of(folder)]


def make_expert(world: Path, kind: str) -> list[str]:
    """Overrides for students and experts that share more or less."""
    if kind == "whole expert, reference apart":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "expert")
        model.merge_and_unload().save_pretrained("whole")
        AutoTokenizer.from_pretrained("base").save_pretrained("whole")
        make_adapter(world / "other", world / "base", seed=7)
        return ["expert=whole", "--reference", "other"]
    if kind == "heads of their own":
        heads = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        make_adapter(world / "expert_head", world / "base", **heads)
        make_adapter(world / "begin", world / "base", seed=5, size=0.05, **heads)
        return ["expert=expert_head", "student_from=begin"]
    return {"lora": ["lora.dropout=0.3"], "full": ["lora=null", "train.learning_rate=1e-3"]}[kind]


@pytest.mark.parametrize("kind", ["lora", "full", "whole expert, reference apart", "heads of their own"])
def test_a_line_at_every_evaluation_agrees_with_it(world: Path, kind: str) -> None:
    folder = run(*make_expert(world, kind), "train.max_steps=6")
    lines, evaluated = drift_of(folder), [line for line in metrics_of(folder) if "eval_loss" in line]
    assert list(lines) == [0, 2, 4, 6]
    for line in lines.values():
        wanted = {"general": ("kl_reference", "loss"), "domain": ("kl_reference", "kl_expert", "loss")}
        assert line.keys() == {f"drift/{route}/{what}" for route, names in wanted.items() for what in names}
    for one in evaluated:  # all 24 rows of each route are few enough to be measured
        line = lines[one["step"]]
        for drifted, known in (
            ("general/kl_reference", "general_kl"),
            ("general/loss", "general_ntp"),
            ("domain/kl_expert", "domain_kl"),
            ("domain/loss", "domain_ntp"),
        ):
            assert line[f"drift/{drifted}"] == pytest.approx(one[f"eval_{known}"], rel=1e-5, abs=1e-9), drifted
    start = {lines[0][f"drift/{route}/kl_reference"] for route in ("general", "domain")}
    assert (start == {0.0}) == (kind in ("lora", "full"))
    assert lines[6]["drift/domain/kl_reference"] not in start


def test_a_student_that_is_the_reference_never_drifts(world: Path) -> None:
    for line in drift_of(run("expert=base", "lora=null", "train.weight_decay=0", "train.max_steps=4")).values():
        assert {value for key, value in line.items() if "kl" in key} == {0.0}


def test_each_expert_is_asked_on_its_own_rows(world: Path) -> None:
    make_adapter(world / "law", world / "base", seed=8)
    command = [
        "align", "--base", "base", "--expert", "shop=expert", "--expert", "law=law", "--output", "student",
        "--general-data", "general.jsonl", "--domain-data", "law=general.jsonl", "--domain-data", "shop=shop.jsonl",
        "data.eval.law=heldout_general.jsonl", "data.eval.shop=heldout_shop.jsonl", "train.max_steps=1",
    ]  # fmt: skip
    assert cli.run(command) == 0
    line, evaluated = drift_of(Path("student"))[1], metrics_of(Path("student"))[-2]
    assert {key.split("/")[1] for key in line} == {"law", "shop"}
    for route in ("law", "shop"):
        assert line[f"drift/{route}/kl_expert"] == pytest.approx(evaluated[f"eval_{route}_kl"], rel=1e-5)


def test_there_is_no_curve_without_held_out_rows(world: Path) -> None:
    assert cli.run(align_command("train.max_steps=2")) == 0
    assert drift_of(Path("student")) == {}


def test_an_evaluation_on_start_is_measured_once(world: Path) -> None:
    assert list(drift_of(run("train.eval_on_start=true", "train.max_steps=2"))) == [0, 2]


@pytest.mark.parametrize(
    "settings",
    [["lora.dropout=0.3"], ["lora=null", "train.learning_rate=1e-3"]],
    ids=["lora", "full"],
)
def test_training_is_the_same_to_the_bit_without_it(
    world: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["train.max_steps=6", "train.gradient_checkpointing=true"]
    watched = run(*settings, *few, output="watched")
    monkeypatch.setattr(dae.alignment.Align, "callbacks", lambda *_: [])
    alone = run(*settings, *few, output="alone")
    assert (drift_of(watched).keys(), drift_of(alone)) == ({0, 2, 4, 6}, {})
    name = "model.safetensors" if "lora=null" in settings else "adapter_model.safetensors"
    for weights in (name, f"checkpoints/step-000006/{name}"):
        assert (watched / weights).read_bytes() == (alone / weights).read_bytes()
    rest = [line for line in without_timings(watched) if not any(key.startswith("drift/") for key in line)]
    assert rest == without_timings(alone)


def test_teachers_pass_once_over_few_rows(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, int]] = []
    forward = dae_eval.drift.forward

    def counted(role: Role, batch: Any) -> Any:
        rows.append((role.name, len(batch["input_ids"])))
        return forward(role, batch)

    monkeypatch.setattr(dae_eval.drift, "forward", counted)
    monkeypatch.setattr(dae_eval.drift, "CURVE_ROWS", 10)
    run("train.max_steps=6")
    passed = {name: sum(count for who, count in rows if who == name) for name, _ in rows}
    assert passed == {"reference": 20, "expert.domain": 10, "student": 4 * 20}


KILLS = {
    "in the first measurement": [Signal("dae_eval.drift:DriftCallback.measure")],
    "with the first line written": [Signal("dae_eval.drift:DriftCallback.measure", 2)],
    "in a later measurement": [Signal("dae_eval.drift:DriftCallback.measure", 3)],
    "with a later line written, but no checkpoint": [Signal("kd.training.trainer:RoutedTrainer._save_checkpoint", 2)],
}


@pytest.mark.slow
def test_a_killed_run_logs_the_same_curve(world: Path) -> None:
    command = align_command(*HELD_OUT, "lora.dropout=0.3", "train.max_steps=8")
    calm = align_command(*HELD_OUT, "lora.dropout=0.3", "train.max_steps=8", output="calm")
    assert dae_process(calm, world, proof=False).status == 0
    for moment, signals in KILLS.items():
        assert dae_process(command, world, proof=False, signals=signals).status == -signal.SIGKILL, moment
    ended = dae_process(command, world, proof=False)
    assert ended.status == 0, ended.err
    assert list(drift_of(world / "student")) == [0, 2, 4, 6, 8]
    assert without_timings(world / "student") == without_timings(world / "calm")
    weights = [(world / run / "adapter_model.safetensors").read_bytes() for run in ("student", "calm")]
    assert weights[0] == weights[1]
