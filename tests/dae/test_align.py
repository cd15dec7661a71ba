"""`dae sft` and `dae align` from recipe to finished run: what each setting does to the student, on pico models."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from pico import FAMILIES, make_checkpoint
from processes import ROOT, Ended, Running, Signal
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import FORGETTING, align_command, make_adapter, make_rows, make_world, metrics_of

import dae.alignment
import kd.training.publishing
from dae import cli
from kd.models.roles import LoadSettings, activate
from kd.stages.stage import StageRoles
from kd.training.verify import verify_saved

HELD_OUT = ("data.eval.domain=heldout_shop.jsonl", "data.eval.general=heldout_general.jsonl")
EVEN_SHARES = ("data.domain.0.share=0.5", "data.general.0.share=0.5")
PROBE = torch.tensor([[5, 60, 70, 80, 90, 100, 110, 120, 130, 31, 41, 59]])


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all that a run is given."""
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    monkeypatch.chdir(place)
    return place


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is loaded with plain transformers and peft and compared, not in a fresh process: that is slow."""

    def compare(
        folder: Path, ids: Sequence[int], expected_TV: Tensor, settings: LoadSettings, _base: Any = None
    ) -> None:
        logits_TV = logits_of(folder, torch.tensor([ids]), settings.dtype)
        tolerance = 1e-5 if settings.dtype == torch.float32 else 2**-5
        scale = float(expected_TV.abs().max())
        torch.testing.assert_close(logits_TV, expected_TV.float(), rtol=0, atol=tolerance * scale)

    monkeypatch.setattr(kd.training.publishing, "verify_saved", compare)


def run(*more: str, output: str = "student") -> Path:
    """A run of `dae align` in the current folder that must succeed; its folder."""
    assert cli.run(align_command(*more, output=output)) == 0
    return Path(output)


def logits_of(folder: Path, ids: Tensor = PROBE, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V] logits of what was saved, by plain transformers and peft."""
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else folder
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype if config.exists() else "auto")
    if config.exists():
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits[0].float()
    return logits


def trained_steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if "loss" in line]


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if "eval_loss" in line]


def start_of(folder: Path) -> dict[str, float]:
    """KL(teacher || student) before the first step, by route."""
    return {key[8:-3]: value for key, value in metrics_of(folder)[0].items() if key.startswith("initial_")}


def assert_same_student(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    moved = float((logits_of(first) - logits_of(Path("base"))).abs().max())
    assert moved > 0.1
    torch.testing.assert_close(logits_of(first), logits_of(second), rtol=0, atol=tolerance)


def merged(adapter: str, target: str, dtype: torch.dtype = torch.float32) -> Path:
    """The adapter merged into `base`, as a full checkpoint beside it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained("base").save_pretrained(target)
    return Path(target)


# -- the result --------------------------------------------------------------------------------------------------------


def test_the_student_comes_to_match_each_teacher_on_its_rows(world: Path) -> None:
    folder = run(*HELD_OUT, *EVEN_SHARES, "train.max_steps=60", "train.save_steps=0.1")
    last = held_out(folder)[-1]
    assert start_of(folder)["general"] == 0
    assert last["eval_domain_kl"] < 0.4 * start_of(folder)["domain"]
    assert last["eval_general_kl"] < 0.25 * start_of(folder)["domain"]


@pytest.mark.slow
def test_a_run_folder_is_proved_in_a_fresh_process_and_holds_what_others_need(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd.training.publishing, "verify_saved", verify_saved)
    folder = run("--merge", "train.max_steps=4")
    names = {entry.name for entry in folder.iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "environment.json",
        "merged", "metrics.jsonl", "provenance.json", "recipe.yaml", "run.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    torch.testing.assert_close(logits_of(folder / "merged"), logits_of(folder), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token == "</s>"
    assert not [file for file in folder.glob("*") if file.suffix in (".bin", ".pt")]
    assert not [name for name in names if name.startswith(".staging")]


def test_a_result_that_does_not_load_is_not_called_finished(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: Any) -> None:
        raise RuntimeError("the saved model differs from the trained one")

    monkeypatch.setattr(kd.training.publishing, "verify_saved", differs)
    monkeypatch.setattr("tempfile.tempdir", str(world))
    assert cli.run(align_command()) == 3
    assert not Path("student/run.json").exists()


def test_provenance_names_every_model_and_file_by_content(world: Path) -> None:
    folder = run("train.max_steps=2", "data.eval.domain=heldout_shop.jsonl")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["stage"] == "align"
    assert provenance["inputs"].keys() == {"base", "reference", "expert.domain"}
    assert provenance["base"] == {"path": "base", "fingerprint": provenance["inputs"]["base"]}
    files = {
        name: hashlib.sha256(Path(f"{name}.jsonl").read_bytes()).hexdigest()
        for name in ("shop", "general", "heldout_shop")
    }
    expected = {
        "general": [{"path": "general.jsonl", "sha256": files["general"], "share": 0.9}],
        "domain": [{"path": "shop.jsonl", "sha256": files["shop"], "share": 0.1}],
        "eval.domain": [{"path": "heldout_shop.jsonl", "sha256": files["heldout_shop"], "share": None}],
    }
    assert all(len(source.pop("encoded")) == 64 for sources in provenance["data"].values() for source in sources)
    assert provenance["data"] == expected
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["learning_rate"] == 0.01
    assert "arXiv 2406.19112" in (folder / "README.md").read_text()


def test_metrics_tell_each_route(world: Path) -> None:
    folder = run("data.eval.domain=heldout_shop.jsonl")
    assert start_of(folder).keys() == {"general", "domain"}
    for line in trained_steps(folder):
        wanted = {"step", "loss", "learning_rate", "grad_norm", "response_tokens_per_second", "peak_memory_gib"}
        for route in ("general", "domain"):
            wanted |= {f"{route}/{what}" for what in ("loss", "kl", "ntp", "tokens")}
        assert wanted <= line.keys()
        assert line["domain/loss"] == pytest.approx(line["domain/kl"])
        assert line["response_tokens_per_second"] > 0
    assert [line["step"] for line in trained_steps(folder)] == [2, 4, 6, 8, 10, 12]
    for line in held_out(folder):
        assert {"step", "eval_loss", "eval_domain_loss", "eval_domain_kl", "eval_domain_ntp"} <= line.keys()
        assert "eval_general_kl" not in line
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["steps"] == 12
    assert summary["rows"] == {"general": 120, "domain": 120, "eval.domain": 24}


def test_a_far_teacher_is_warned_of(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    far = AutoModelForCausalLM.from_pretrained(make_checkpoint(world / "far", seed=9))
    with torch.no_grad():
        far.lm_head.weight *= 6
    far.save_pretrained("far")
    folder = run("expert=far", "train.max_steps=1")
    assert start_of(folder)["domain"] > 2
    assert "route domain: KL(teacher || student)" in caplog.text
    assert "route general" not in caplog.text


def test_an_adapter_on_the_head(world: Path) -> None:
    folder = run("lora.target_modules=[q_proj, lm_head]", "train.gradient_accumulation_steps=2")
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("lm_head.lora_B" in name and tensor.any() for name, tensor in weights.items())
    assert start_of(folder)["general"] == 0


def test_from_python(world: Path) -> None:
    from dae import AlignRecipe, align

    given = {
        "base": "base",
        "expert": "expert",
        "output": "s",
        "data": {"general": "general.jsonl", "domain": "shop.jsonl"},
    }
    result = align(AlignRecipe.model_validate({**given, "train": {"max_steps": 2}}))
    assert result.path == Path("s")
    assert result.summary["steps"] == 2


# -- how the work is cut ----------------------------------------------------------------------------------------------


def cut(micro_batch: int, accumulation: int) -> list[str]:
    return [
        f"train.per_device_train_batch_size={micro_batch}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "micro_batches"), [("routes", (4, 2, 1)), ("tokens", (1,))])
def test_accumulation_does_not_matter(world: Path, weights: str, micro_batches: Sequence[int]) -> None:
    whole = run(*cut(8, 1), f"weights={weights}", output="whole")
    for micro_batch in micro_batches:
        parts = run(*cut(micro_batch, 8 // micro_batch), f"weights={weights}", output=f"by{micro_batch}")
        assert_same_student(whole, parts)
        for one, other in zip(trained_steps(whole), trained_steps(parts), strict=True):
            for key in ("loss", "grad_norm", "general/kl", "domain/kl"):
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6)
            for key in ("general/tokens", "domain/tokens"):
                assert other[key] == one[key]


def ranks(arguments: Sequence[str], world: Path, signals: Sequence[Sequence[Signal]] = ((), ())) -> list[Ended]:
    """The command on several ranks, with the environment that a launcher gives them; signals: of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(signals))
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        Running(
            arguments,
            world,
            proof=False,
            signals=own,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, own in enumerate(signals)
    ]
    return [one.end() for one in running]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["train.gradient_checkpointing=true"], ["lora=null"], ["weights=tokens", HELD_OUT[0]]], ids=str
)
def test_two_ranks_give_the_student_of_one(world: Path, more: list[str]) -> None:
    more = [*more, "train.max_steps=6"]
    one = run(*cut(8, 1), *more, output="one")
    ended = ranks(align_command(*cut(4, 1), *more, output="two"), world)
    assert [(rank.status, "Traceback" in rank.err) for rank in ended] == [(0, False)] * 2, ended
    assert ended[1].out == ""
    assert ended[1].err == ""
    assert_same_student(one, Path("two"))
    for first, second in zip(metrics_of(one), metrics_of(Path("two")), strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"response_tokens_per_second", "peak_memory_gib"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-6), key


def test_two_ranks_end_together(world: Path) -> None:
    refused = ranks(align_command("data.max_length=3"), world)
    assert [rank.status for rank in refused] == [2, 2]
    assert [rank.err.count("\n") for rank in refused] == [1, 0]
    (world / "student").mkdir()
    (world / "student" / "mine").touch()
    refused = ranks(align_command(), world)
    assert [rank.status for rank in refused] == [2, 2]
    assert "holds files that this command did not write" in refused[0].err
    assert refused[1].err == ""


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step_and_go_on_together(world: Path) -> None:
    one = run(*cut(8, 1), output="one")
    command = align_command(*cut(4, 1), output="two")
    in_step_five = Signal("kd.training.trainer:RoutedTrainer.training_step", 5, signal.SIGTERM)
    stopped = ranks(command, world, [[], [in_step_five]])
    assert [rank.status for rank in stopped] == [143, 143]
    assert stopped[0].err.splitlines()[-1].startswith("dae align: stopped after step 5 of 12")
    assert cli.run(command) == 2  # alone it would take half as many rows for a step
    assert [rank.status for rank in ranks(command, world)] == [0, 0]
    assert_same_student(one, Path("two"))


@pytest.mark.slow
def test_torchrun(world: Path) -> None:
    one = run(*cut(8, 1), "train.max_steps=6", output="one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dae"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    done = subprocess.run(
        [*launcher, *align_command(*cut(4, 1), "train.max_steps=6", output="two")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same_student(one, Path("two"))


def test_gradient_checkpointing_does_not_matter(world: Path) -> None:
    plain = run(output="plain")
    assert_same_student(plain, run("train.gradient_checkpointing=true", output="checkpointed"))
    new_name = ["train.activation_checkpointing=true", "train.activation_checkpointing_kwargs={every_n_layers: 2}"]
    assert_same_student(plain, run(*new_name, output="every second layer"))


def test_packing_does_not_matter(world: Path) -> None:
    plain = run(*cut(4, 2), output="plain")
    packed = run("data.packing=true", *cut(4, 2), HELD_OUT[0], output="packed")
    assert_same_student(plain, packed, 1e-4)
    padded = run(*cut(4, 2), HELD_OUT[0], output="padded")
    for one, other in zip(held_out(packed), held_out(padded), strict=True):
        assert one["eval_domain_kl"] == pytest.approx(other["eval_domain_kl"], rel=1e-4)


def test_bfloat16_goes_the_same_way_on_a_cpu(world: Path) -> None:
    exact, rounded = run(output="exact"), run("dtype=bfloat16", output="rounded")
    assert [line["domain/tokens"] for line in trained_steps(rounded)] == [
        line["domain/tokens"] for line in trained_steps(exact)
    ]
    last = [trained_steps(folder)[-1]["domain/kl"] for folder in (exact, rounded)]
    assert last[1] == pytest.approx(last[0], rel=0.2)
    full = run("dtype=bfloat16", "lora=null", "train.learning_rate=1e-3", output="full")
    dtypes = {tensor.dtype for tensor in load_file(full / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("lora", ["lora.rank=2", "lora=null"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(world: Path, family: str, lora: str) -> None:
    shutil.rmtree("base")
    shutil.rmtree("expert")
    make_adapter(world / "expert", make_checkpoint(world / "base", family))
    command = [word for word in align_command("train.max_steps=4") if word != "lora.rank=4"]
    assert cli.run([*command, lora, "train.gradient_checkpointing=true"]) == 0
    assert start_of(Path("student"))["general"] == 0
    assert math.isfinite(trained_steps(Path("student"))[-1]["loss"])


# -- roles -------------------------------------------------------------------------------------------------------------


def test_where_all_teachers_are_the_base_nothing_moves_at_all(world: Path) -> None:
    folder = run("expert=base", "train.weight_decay=0")
    weights = load_file(folder / "adapter_model.safetensors")
    begun = load_file(min((folder / "checkpoints").iterdir()) / "adapter_model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, begun[name])
        assert ("lora_B" in name) == (not tensor.any())
    assert {line["loss"] for line in trained_steps(folder)} == {0.0}
    assert {line["grad_norm"] for line in trained_steps(folder)} == {0.0}


def test_where_all_teachers_are_the_base_full_weights_do_not_move_either(world: Path) -> None:
    folder = run("expert=base", "lora=null", "train.weight_decay=0")
    before, after = load_file("base/model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_teachers_do_not_move_while_the_student_does(world: Path, lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[StageRoles] = []
    before: list[dict[str, Tensor]] = []
    build = dae.alignment.Align.build_roles

    def keep(*arguments: Any) -> StageRoles:
        kept.append(build(*arguments))
        before.append(logits_of_roles(kept[0]))
        return kept[0]

    monkeypatch.setattr(dae.alignment.Align, "build_roles", keep)
    run(lora, "train.max_steps=10")
    after = logits_of_roles(kept[0])
    for name in ("reference", "expert.domain"):
        assert torch.equal(after[name], before[0][name])
    assert not torch.equal(after["student"], before[0]["student"])
    assert torch.equal(before[0]["student"], before[0]["reference"])
    shared = len({id(parameter) for role in kept[0].all for parameter in role.model.parameters()})
    alone = len(load_file("base/model.safetensors"))
    adapters = len(load_file("expert/adapter_model.safetensors"))
    assert shared == (alone + 2 * adapters if lora != "lora=null" else 2 * alone + adapters)


def logits_of_roles(roles: StageRoles) -> dict[str, Tensor]:
    logits = {}
    for role in roles.all:
        with activate(role) as model, torch.no_grad():
            logits[role.name] = model(input_ids=PROBE).logits.clone()
    return logits


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_an_adapter_teaches_what_its_merged_checkpoint_does(world: Path, kind: dict[str, Any]) -> None:
    make_adapter(world / "adapter", world / "base", **kind)
    merged("adapter", "whole")
    one, other = run("expert=adapter", output="one"), run("expert=whole", output="other")
    assert start_of(one)["domain"] > 0.01
    assert start_of(one) == pytest.approx(start_of(other), rel=1e-4, abs=1e-7)
    assert_same_student(one, other, 2e-3)


def test_a_head_of_the_experts_own_is_its_own_only(world: Path) -> None:
    make_adapter(world / "adapter", world / "base", target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = load_file("adapter/adapter_model.safetensors")
    head = next(name for name in weights if "lm_head" in name)
    weights[head] *= 1.5
    from safetensors.torch import save_file

    save_file(weights, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    merged("adapter", "whole")
    one, other = run("expert=adapter", output="one"), run("expert=whole", output="other")
    assert start_of(one)["general"] == 0
    assert start_of(one) == pytest.approx(start_of(other), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("padded", ["base", "expert"])
def test_padded_vocabularies_do_not_matter(world: Path, padded: str) -> None:
    merged("expert", "teacher")
    begin = ["expert=teacher", f"student_from={make_adapter(world / 'begin', world / 'base', size=0.01)}"]
    plain = run(*begin, output="plain")
    model = AutoModelForCausalLM.from_pretrained("base" if padded == "base" else "teacher")
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():  # were the rows of padding read, they would take nearly all of the probability
        model.get_output_embeddings().weight[288:] = 3.0
    model.save_pretrained("wide")
    AutoTokenizer.from_pretrained("base").save_pretrained("wide")
    wide = run(*begin, *(["--base", "wide"] if padded == "base" else ["expert=wide"]))
    assert start_of(wide)["domain"] == pytest.approx(start_of(plain)["domain"], rel=1e-4)
    if padded == "expert":
        torch.testing.assert_close(logits_of(wide), logits_of(plain), rtol=0, atol=1e-4)


def test_the_reference_may_be_another_checkpoint(world: Path) -> None:
    make_adapter(world / "other", world / "base", seed=7)
    merged("other", "reference")
    folder = run("--reference", "reference", "train.max_steps=40", "train.save_steps=0.5")
    assert start_of(folder)["general"] > 0.05
    assert trained_steps(folder)[-1]["general/kl"] < 0.7 * start_of(folder)["general"]
    adapter = run("--reference", "other", output="adapter")
    assert start_of(adapter) == pytest.approx(start_of(folder), rel=1e-4)


def test_experts_are_paired_with_rows_by_name(world: Path) -> None:
    make_adapter(world / "expert2", world / "base", seed=8, size=0.2)
    make_rows(world / "law.jsonl", 9)
    alone = [
        run("train.max_steps=1", output="a"),
        run("expert=expert2", "data.domain=law.jsonl", "train.max_steps=1", output="b"),
    ]
    command = [
        "align", "--base", "base", "--expert", "shop=expert", "--expert", "law=expert2",
        "--general-data", "general.jsonl", "--domain-data", "law=law.jsonl", "--domain-data", "shop=shop.jsonl",
        "--output", "both", "train.max_steps=20", "train.logging_steps=20",
    ]  # fmt: skip
    assert cli.run(command) == 0
    start = start_of(Path("both"))
    assert start["shop"] == pytest.approx(start_of(alone[0])["domain"])
    assert start["law"] == pytest.approx(start_of(alone[1])["domain"])
    assert {"general/kl", "shop/kl", "law/kl"} <= trained_steps(Path("both"))[-1].keys()
    shares = {k: v[0]["share"] for k, v in json.loads(Path("both/provenance.json").read_text())["data"].items()}
    assert shares == pytest.approx({"general": 0.9, "shop": 0.05, "law": 0.05})


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_a_student_goes_on_from_an_earlier_one(world: Path, lora: str) -> None:
    first = run(lora, output="first")
    still = run(lora, "--recipe", recipe("student_from: first"), "train.learning_rate=0", output="still")
    torch.testing.assert_close(logits_of(still), logits_of(first), rtol=0, atol=1e-6)
    assert start_of(still)["general"] > 0
    assert start_of(still)["domain"] < start_of(first)["domain"]


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text + "\n")
    return "recipe.yaml"


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["routes", "tokens", "{general: 1.0, domain: 3.0}"])
def test_weights_of_routes(world: Path, weights: str) -> None:
    folder = run(f"weights={weights}", "train.logging_steps=1", *cut(4, 2))
    factors = {"general": 1.0, "domain": 3.0 if weights.startswith("{") else 1.0}
    for line in trained_steps(folder):
        routes = [route for route in factors if f"{route}/loss" in line]
        share = {r: line[f"{r}/tokens"] if weights == "tokens" else factors[r] for r in routes}
        expected = sum(share[r] * line[f"{r}/loss"] for r in routes) / sum(share.values())
        assert line["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "kl_weight", "ntp_weight"), [(["lambda=0"], 0, 1), (["lambda=0.25"], 0.25, 0.75), (["lambda=1"], 1, 0)]
)
def test_lambda_mixes_divergence_and_next_tokens(
    world: Path, settings: list[str], kl_weight: float, ntp_weight: float
) -> None:
    for line in trained_steps(run(*settings)):
        for route in ("general", "domain"):
            expected = ntp_weight * line[f"{route}/ntp"] + kl_weight * line.get(f"{route}/kl", 0.0)
            assert line[f"{route}/loss"] == pytest.approx(expected, rel=1e-5)


def test_other_divergences_and_temperatures_lead_to_the_teacher_too(world: Path) -> None:
    students = {}
    for number, settings in enumerate(
        [["divergence=reverse_kl"], ["divergence=jsd", "beta=0.3"], ["temperature=2"], ["divergence=forward_kl"]]
    ):
        more = [*settings, *EVEN_SHARES, "train.max_steps=30", "train.logging_steps=10", "train.save_steps=0.5"]
        folder = run(*more, output=f"s{number}")
        assert trained_steps(folder)[-1]["domain/kl"] < 0.5 * start_of(folder)["domain"]
        students[settings[0]] = logits_of(folder)
    plain = students.pop("divergence=forward_kl")
    assert all((logits - plain).abs().max() > 1e-3 for logits in students.values())


def test_a_step_size_that_is_far_too_large_is_told(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(align_command("train.learning_rate=1e30", "train.logging_steps=1", "train.max_grad_norm=0")) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert "train.learning_rate: 1e+30: the loss is no longer finite at step" in told


# -- held-out rows -----------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_published(world: Path) -> None:
    folder = run(*FORGETTING)
    losses = {line["step"]: line["eval_loss"] for line in held_out(folder)}
    assert min(losses, key=lambda step: losses[step]) == 2
    kept = folder / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    assert kept.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["best_step"] == 2
    assert summary["held_out"]["eval_loss"] == losses[2]


def test_held_out_kl_is_that_of_the_definition(world: Path) -> None:
    folder = run("data.eval.domain=heldout_shop.jsonl", "train.max_steps=2")
    tokenizer = AutoTokenizer.from_pretrained("base")
    expert = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "expert").eval().double()
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), str(folder)).eval().double()
    total, tokens = 0.0, 0
    for line in Path("heldout_shop.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p, log_q = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (expert, student))
        kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 : -1]
        total, tokens = total + float(kl_T.sum()), tokens + len(kl_T)
    assert held_out(folder)[-1]["eval_domain_kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_early_stopping(world: Path) -> None:
    settings = [*HELD_OUT, "early_stopping_patience=2", "train.learning_rate=0", "train.max_steps=40"]
    folder = run(*settings)
    assert [line["step"] for line in held_out(folder)] == [2, 4, 6]
    assert json.loads((folder / "run.json").read_text())["summary"]["steps"] == 6
    finished = (folder / "run.json").stat().st_mtime_ns
    assert run(*settings) == folder
    assert (folder / "run.json").stat().st_mtime_ns == finished


# -- sft, and the card's short command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_sft_learns_its_rows_and_writes_where_it_came_from(world: Path, lora: str) -> None:
    settings = ["train.max_steps=30", "train.learning_rate=1e-2", "train.logging_steps=10"]
    command = ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "made", lora, *settings]
    assert cli.run(command) == 0
    steps = trained_steps(Path("made"))
    assert steps[-1]["train/ntp"] < steps[0]["train/ntp"] - 0.5
    assert "train/kl" not in steps[-1]
    provenance = json.loads(Path("made/provenance.json").read_text())
    assert provenance["stage"] == "sft"
    digest = hashlib.sha256(Path("shop.jsonl").read_bytes()).hexdigest()
    assert len(provenance["data"]["train"][0].pop("encoded")) == 64
    assert provenance["data"] == {"train": [{"path": "shop.jsonl", "sha256": digest, "share": 1.0}]}


def test_the_short_command_works_as_typed(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["train.max_steps=4"]
    assert cli.run(["sft", "--base", "base", "--data", "general.jsonl", "--output", "ckpt", "lora=null", *few]) == 0
    assert cli.run(["sft", "--base", "ckpt", "--data", "shop.jsonl", "--output", "ecom-expert", *few]) == 0
    short = ["align", "--base", "ckpt", "--expert", "ecom-expert", "--reference", "ckpt"]
    assert cli.run(short) == 0
    sources = yaml.safe_load(Path("runs/align/recipe.yaml").read_text())["data"]
    assert sources["domain"][0]["path"] == "shop.jsonl"
    assert sources["general"][0]["path"] == "general.jsonl"
    capfd.readouterr()
    make_rows(world / "shop.jsonl", 77)
    assert cli.run([*short, "--output", "again"]) == 2
    told = capfd.readouterr().err
    assert "add --domain-data PATH; ecom-expert was trained on shop.jsonl, which has changed since" in told
    assert not Path("again").exists()


def test_trackers_get_what_metrics_jsonl_gets(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    folder = run("train.report_to=tensorboard")
    assert [line["domain/kl"] for line in logged if "domain/kl" in line] == [
        line["domain/kl"] for line in trained_steps(folder)
    ]


class WriterToDisk:
    """What transformers' callback asks of a SummaryWriter: scalars by name, in a file of its folder."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = Path(log_dir) / "events"

    def add_text(self, *_: Any) -> None:
        pass

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{name} {step}\n")

    def flush(self) -> None:
        pass

    close = flush


def test_the_files_of_a_tracker_stay_in_the_run_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=WriterToDisk))
    folder = run("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1")
    assert "train/domain/kl 2" in (folder / "trackers" / "events").read_text().splitlines()
    assert cli.run(align_command("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1")) == 0
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    run("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1", output="other")
    assert Path("elsewhere/events").is_file()
    assert not Path("other/trackers").exists()


def test_align_runs_in_a_thread(world: Path) -> None:
    """From a notebook's or a server's thread, where Python lets nobody take signals."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(cli.run, align_command("train.max_steps=1")).result() == 0


def test_a_tracker_that_is_not_there_is_told(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(align_command("train.report_to=trackio")) == 2
    assert "train.report_to=trackio: trackio is not installed" in capfd.readouterr().err
