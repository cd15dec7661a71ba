"""`dae merge weights`: each method against its definition, what lies beside the weights, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pico import make_checkpoint, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_adapter

from dae import cli
from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from kd.config.loading import load_recipe, resolved_yaml
from kd.config.schema import Frozen
from kd.models.checkpoint import checkpoint
from kd.runs.provenance import read_provenance

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, reference and expert (full checkpoints), lora (on base)."""
    place = tmp_path_factory.mktemp("origin")
    for seed, name in enumerate(("base", "reference", "expert")):
        make_checkpoint(place / name, "mistral", seed=seed)
    make_adapter(place / "lora", place / "base")
    return place


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for entry in origin.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("dae")
    before = logger.propagate
    logger.propagate = True
    yield tmp_path
    logger.propagate = before


def command(method: str, *more: str, output: str = "merged") -> list[str]:
    return ["merge", "weights", "--method", method, "--base", "base", "--expert", "expert", "--output", output, *more]


def merged(method: str, *more: str, output: str = "merged") -> dict[str, Tensor]:
    """The weights of a merge that must succeed."""
    assert cli.run(command(method, *more, output=output)) == 0
    return weights_of(output)


def weights_of(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must be refused as the user's mistake, without leaving anything."""
    assert cli.run(arguments) == 2
    assert not Path("merged").exists()
    return capsys.readouterr().err


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=tolerance)


def in_float64(folder: str) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights_of(folder).items()}


# -- the arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_linear_is_the_weighted_mean_of_reference_and_expert(world: Path, weight: float) -> None:
    reference, expert = in_float64("reference"), in_float64("expert")
    found = merged("linear", "--reference", "reference", f"weight={weight}")
    assert_same(found, {name: (1 - weight) * reference[name] + weight * expert[name] for name in reference})


def test_without_a_reference_the_base_is_it(world: Path) -> None:
    base, expert = in_float64("base"), in_float64("expert")
    assert_same(merged("linear"), {name: (base[name] + expert[name]) / 2 for name in base})


def test_slerp_goes_along_the_arc_of_each_tensor(world: Path) -> None:
    reference, expert = in_float64("reference"), in_float64("expert")

    def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
        angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
        if angle < 0.03:  # as good as parallel, such as two norms of ones
            return (1 - t) * a + t * b
        return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)

    found = merged("slerp", "--reference", "reference", "weight=0.3")
    assert_same(found, {name: arc(reference[name], expert[name], 0.3) for name in reference}, 1e-5)


def test_task_arithmetic_adds_both_task_vectors(world: Path) -> None:
    base, reference, expert = in_float64("base"), in_float64("reference"), in_float64("expert")
    found = merged("task_arithmetic", "--reference", "reference", "weight=0.4")
    vectors = {name: (reference[name] - base[name]) + (expert[name] - base[name]) for name in base}
    assert_same(found, {name: base[name] + 0.4 * vectors[name] for name in base})


def test_a_reference_that_is_the_base_has_no_task_vector(world: Path) -> None:
    base, expert = in_float64("base"), in_float64("expert")
    assert_same(merged("task_arithmetic", "weight=0.4"), {n: base[n] + 0.4 * (expert[n] - base[n]) for n in base})


def test_ties_by_hand(world: Path) -> None:
    """Trim to the two largest of four, elect the sign of the larger sum, take the mean of those that have it."""
    vectors = {
        #             both agree  signs differ  expert alone  trimmed from both
        "reference": [4.0, -3.0, 0.5, -0.2],
        "expert": [2.0, 1.0, 6.0, 0.1],
    }
    kept = {"reference": [4.0, -3.0, 0.0, 0.0], "expert": [2.0, 0.0, 6.0, 0.0]}
    by_hand = [(4.0 + 2.0) / 2, -3.0, 6.0, 0.0]
    assert kept["reference"][1] + kept["expert"][1] < 0  # the elected sign of the second entry
    name, repeats = "model.norm.weight", 4  # 16 entries: the four, four times
    for role, vector in vectors.items():
        change_tensor(world, role, name, torch.tensor(vector * repeats))
    found = merged("ties", "--reference", "reference", "density=0.5", "weight=0.5")
    ours = weights_of("base")[name]
    torch.testing.assert_close(found[name], ours + 0.5 * torch.tensor(by_hand * repeats))


def test_ties_elects_signs_by_the_sum_of_what_is_left(world: Path) -> None:
    name = "model.norm.weight"
    for role, vector in {"reference": [-3.0, 2.0], "expert": [5.0, -4.0]}.items():
        change_tensor(world, role, name, torch.tensor(vector * 8))
    found = merged("ties", "--reference", "reference", "density=1.0")
    torch.testing.assert_close(found[name], weights_of("base")[name] + torch.tensor([5.0, -4.0] * 8))


def change_tensor(world: Path, role: str, name: str, difference: Tensor) -> None:
    """Replace a role by the base with one tensor changed."""
    place = world / role
    place.unlink()
    place.mkdir()
    for file in (world / "base").iterdir():
        (place / file.name).symlink_to(file.resolve())
    tensors = weights_of("base")
    (place / "model.safetensors").unlink()
    save_file({**tensors, name: tensors[name] + difference}, place / "model.safetensors", metadata={"format": "pt"})


def test_dare_drops_entries_at_random_and_scales_up_the_others(world: Path) -> None:
    base, expert = in_float64("base"), in_float64("expert")
    found = merged("dare_ties", "density=0.25", "weight=0.5")
    kept = count = 0
    for name in base:
        vector, difference = expert[name] - base[name], found[name].double() - base[name]
        stays = difference.abs() > 1e-9
        torch.testing.assert_close(difference[stays], 0.5 * vector[stays] / 0.25, rtol=1e-3, atol=1e-5)
        moved = vector.abs() > 1e-6
        kept, count = kept + int(stays[moved].sum()), count + int(moved.sum())
    assert abs(kept / count - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5


def test_the_seed_decides_what_dare_keeps(world: Path) -> None:
    first, same, other = (merged("dare_ties", f"seed={seed}", output=f"m{i}") for i, seed in enumerate((1, 1, 2)))
    assert_same(same, first, 0.0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_run_folder_that_opens_anywhere(world: Path, method: str) -> None:
    merged(method, "--reference", "reference")
    model = AutoModelForCausalLM.from_pretrained("merged")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert model.config.sliding_window == 64
    assert (tokenizer.pad_token, model.generation_config.pad_token_id) == ("<pad>", 0)
    provenance = read_provenance("merged")
    assert provenance is not None
    assert provenance["stage"] == "merge"
    assert provenance["inputs"] == {role: checkpoint(role).fingerprint for role in ("base", "reference", "expert")}
    assert json.loads(Path("merged/run.json").read_text())["summary"]["method"] == method
    assert json.loads(Path("merged/environment.json").read_text())["libraries"]["mergekit"]
    card = Path("merged/README.md").read_text()
    assert provenance["inputs"]["expert"] in card
    assert "library_name: transformers" in card
    assert not list(Path("merged").glob(".[tp]*"))


def test_an_adapter_is_merged_into_its_base_first(world: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora").merge_and_unload()
    base = in_float64("base")
    assert (
        cli.run(["merge", "weights", "--method", "linear", "--base", "base", "--expert", "lora", "--output", "m"]) == 0
    )
    expected = {name: (base[name] + tensor.double()) / 2 for name, tensor in model.state_dict().items()}
    assert_same(weights_of("m"), expected)
    assert not list(Path("m").glob(".tmp*"))


def test_an_adapter_of_the_reference_is_merged_into_the_reference(world: Path) -> None:
    make_adapter(world / "on_reference", world / "reference", seed=3)
    base = {"path": "reference", "fingerprint": checkpoint("reference").fingerprint}
    told = {"toolkit": "dae-align", "stage": "sft", "base": base}
    (world / "on_reference" / "provenance.json").write_text(json.dumps({**told, "inputs": {}, "data": {}}))
    (world / "on_reference" / "run.json").write_text("{}")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("reference"), "on_reference")
    expected = whole.merge_and_unload().state_dict()
    arguments = command("linear", "--reference", "reference", "weight=1", output="m")
    arguments[arguments.index("expert")] = "on_reference"
    assert cli.run(arguments) == 0
    assert_same(weights_of("m"), expected)


def test_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "expert")):
        make_checkpoint(tmp_path / name, seed=seed, dtype=torch.bfloat16)
    base, expert, found = weights_of("base"), weights_of("expert"), merged("linear", "weight=0.3")
    for name, tensor in found.items():
        exact = 0.7 * base[name].double() + 0.3 * expert[name].double()
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()  # half of the last bit
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16


def test_a_path_may_hold_signs_that_mean_something_to_mergekit(world: Path) -> None:
    (world / "base@v1+x").symlink_to((world / "base").resolve())
    arguments = command("linear", "weight=0")
    arguments[arguments.index("base")] = "base@v1+x"
    assert cli.run(arguments) == 0
    assert_same(weights_of("merged"), weights_of("base"), 0.0)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (command("linear", "weight=1.5"), "weight=1.5: "),
        (command("ties", "weight=-1"), "weight=-1: "),
        (command("linear", "density=0.5"), "density=0.5: "),
        (command("ties", "density=0"), "density=0: "),
        (command("tie"), "--method: method = 'tie': "),
        (command("linear", "wieght=0.1"), "did you mean `weight`?"),
        (command("linear", "--expert", "nowhere"), "nowhere: "),
        (command("linear", "--expert", "base"), "expert base: is identical to the reference"),
        (command("ties", "--reference", "reference", "--expert", "base"), "expert base: is identical to the base"),
        (command("linear", "--base", "lora"), "base: lora: is an adapter"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    message = refusal(arguments, capsys)
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "qwen2"}, "expert other: is a Qwen2ForCausalLM, but base is a MistralForCausalLM"),
        ({"intermediate_size": 48}, "expert other: model.layers.0.mlp.gate_proj.weight is [48, 16]"),
        ({"vocab_size": 320}, "model.resize_token_embeddings(288)"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_attention_heads is 2, but 4 in base"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight is missing"),
    ],
)
def test_an_expert_of_another_shape_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: str
) -> None:
    make_checkpoint(world / "other", **{"family": "mistral", **settings})
    arguments = command("linear", "--expert", "other")
    assert words in refusal(arguments, capsys)


def test_an_expert_with_another_tokenizer_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("mistral", seed=5).save_pretrained(world / "other")
    make_tokenizer(270).save_pretrained(world / "other")
    assert "its tokenizer differs from that of base" in refusal(command("linear", "--expert", "other"), capsys)


def test_an_adapter_on_another_base_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(world / "wide", "mistral", hidden_size=32)
    make_adapter(world / "on_wide", world / "wide")
    assert "trained on another base" in refusal(command("linear", "--expert", "on_wide"), capsys)


def test_an_architecture_that_mergekit_knows_in_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """mergekit leaves the biases of such a Llama out, and transformers would make them up."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "expert")):
        make_checkpoint(tmp_path / name, "llama", seed=seed, attention_bias=True)
    message = refusal(command("linear"), capsys)
    assert "base: mergekit cannot merge a LlamaForCausalLM" in message
    assert "bias (missing keys)" in message


def test_another_rotary_base_is_warned_about(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    make_checkpoint(world / "other", "mistral", seed=4, rope_parameters=rope)
    assert cli.run(command("linear", "--expert", "other")) == 0
    assert "expert other: rope_parameters is" in caplog.text
    assert AutoModelForCausalLM.from_pretrained("merged").config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("name", "schema"),
    [("moe_2x7b", MoeRecipe), ("task_arithmetic_7b", WeightsRecipe), ("to_lora_7b", ToLoraRecipe)],
)
def test_shipped_recipes_load_and_read_back_the_same(name: str, schema: type[Frozen], tmp_path: Path) -> None:
    recipe = load_recipe(schema, Path(__file__).parents[2] / "recipes" / "merge" / f"{name}.yaml", {})
    (tmp_path / "copy.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(schema, tmp_path / "copy.yaml", {}) == recipe


def test_the_command_line_stays_light() -> None:
    code = "import sys, dae.commands.merge; print({'torch', 'transformers', 'mergekit', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert ran.stdout == b"set()\n"
