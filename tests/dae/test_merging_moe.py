"""`dae merge moe`: identical experts are the dense model; the mixture opens, routes, trains and aligns."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from pico import make_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from worlds import make_adapter, make_rows, metrics_of

import kd.training.publishing
from dae import cli
from kd.config.stage_recipe import LoraRecipe
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.compatibility import check_adapter
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    activate,
    add_frozen_adapter,
    add_student_adapter,
    load_model,
)

LONG = torch.randint(3, 288, (1, 150), generator=torch.Generator().manual_seed(0))  # longer than the window of 64
PROMPTS = {"general": ["how big is it?", "red green blue"], "shop": ["KETTLE COSTS NINE COINS", "PRICE OF A POT 4X"]}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and expert: full Mistral checkpoints; lora: an adapter on base; shop.jsonl, general.jsonl."""
    place = tmp_path_factory.mktemp("origin")
    make_checkpoint(place / "base", "mistral")
    make_checkpoint(place / "expert", "mistral", seed=1)
    make_adapter(place / "lora", place / "base")
    for seed, name in enumerate(("shop", "general")):
        make_rows(place / f"{name}.jsonl", seed)
    return place


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for entry in origin.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # a fresh process takes seconds
    logger = logging.getLogger("dae")
    before = logger.propagate
    logger.propagate = True
    yield tmp_path
    logger.propagate = before


def write_recipe(general: str = "base", shop: str = "expert", **settings: Any) -> str:
    experts = {"general": {"path": general}, "shop": {"path": shop}}
    for name, expert in experts.items():
        expert["prompts"] = PROMPTS[name]  # type: ignore[assignment]
    Path("moe.yaml").write_text(yaml.dump({"experts": experts, **settings}))
    return "moe.yaml"


def mix(*more: str, output: str = "moe", **settings: Any) -> Path:
    """A mixture that must be made."""
    recipe = write_recipe(**settings)
    assert cli.run(["merge", "moe", "--recipe", recipe, "--base", "base", "--output", output, *more]) == 0
    return Path(output)


def opened(folder: str | Path) -> PreTrainedModel:
    """Opened by plain transformers, every tensor accounted for."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def logits_of(model: Any, ids: Tensor = LONG) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def routers_of(folder: str | Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(Path(folder) / "model.safetensors").items() if ".gate." in name}


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {}),  # its sliding window must survive
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
        ("qwen3", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),  # in no layer
    ],
    ids=["mistral", "llama", "llama, tied", "llama, stretched", "qwen3", "qwen3, sliding", "qwen3, not sliding"],
)  # fmt: skip
def test_identical_experts_are_the_dense_model(world: Path, family: str, settings: dict[str, Any]) -> None:
    (world / "base").unlink()
    make_checkpoint(world / "base", family, seed=7, **settings)
    mixture = opened(mix(shop="base"))
    expected = logits_of(opened("base"))
    assert type(mixture).__name__ in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
    torch.testing.assert_close(logits_of(mixture), expected, rtol=0, atol=1e-5)


def test_each_expert_is_the_mlp_of_its_checkpoint(world: Path) -> None:
    """The definition: the router's softmax over the experts' MLPs, with the base's attention and norms."""
    mixture, dense = opened(mix()), {name: opened(name) for name in ("base", "expert")}
    states: dict[str, Tensor] = {}
    layer = mixture.model.layers[1]
    layer.mlp.register_forward_hook(lambda _m, args, out: states.update(given=args[0], said=out))
    logits_of(mixture)
    probabilities_BTE = (states["given"] @ layer.mlp.gate.weight.T).softmax(-1)
    parts = [model.model.layers[1].mlp(states["given"]) for model in dense.values()]
    expected = sum(probabilities_BTE[..., i : i + 1] * part for i, part in enumerate(parts))
    torch.testing.assert_close(states["said"], expected, rtol=0, atol=1e-5)
    weights, base = mixture.state_dict(), dense["base"].state_dict()
    for name in (name for name in base if ".mlp." not in name):
        assert torch.equal(weights[name], base[name])


def test_a_gate_of_hidden_states_sends_prompts_to_their_experts(world: Path) -> None:
    mixture = opened(mix())
    tokenizer = AutoTokenizer.from_pretrained("moe")
    favoured: dict[str, float] = {}
    layer = mixture.model.layers[0]  # its router sees what it was made from, but for the norm
    for place, (name, prompts) in enumerate(PROMPTS.items()):
        logits: list[Tensor] = []
        handle = layer.mlp.gate.register_forward_hook(lambda _m, _a, out, logits=logits: logits.append(out[0][-1]))
        for prompt in prompts:
            logits_of(mixture, tokenizer("<s>" + prompt, return_tensors="pt", add_special_tokens=False).input_ids)
        handle.remove()
        favoured[name] = float(sum(row.softmax(-1)[place] for row in logits)) / len(prompts)
    assert favoured["general"] + favoured["shop"] > 1  # better than a router that does not look


def test_prompts_that_are_too_alike_are_warned_about(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts = {name: {"path": "base", "prompts": [f"red green {end}"]} for name, end in (("a", "blue"), ("b", "blue "))}
    Path("moe.yaml").write_text(yaml.dump({"experts": experts}))
    assert (
        cli.run(["merge", "moe", "--recipe", "moe.yaml", "--base", "base", "--gate", "cheap_embed", "--output", "m"])
        == 0
    )
    assert "your prompts may be too similar" in caplog.text
    assert "all are the same model" in caplog.text


def test_the_gates_differ_and_the_seed_decides_a_random_one(world: Path) -> None:
    made = {gate: routers_of(mix("--gate", gate, output=gate)) for gate in ("hidden", "cheap_embed", "random")}
    made["again"] = routers_of(mix("--gate", "random", output="again"))
    made["other"] = routers_of(mix("--gate", "random", "seed=1", output="other"))
    first = {name: next(iter(routers.values())) for name, routers in made.items()}
    assert torch.equal(first["random"], first["again"])
    for one, two in (("hidden", "cheap_embed"), ("hidden", "random"), ("random", "other")):
        assert not torch.equal(first[one], first[two])
    assert float(first["random"].abs().max()) <= 1 / 16**0.5  # as torch.nn.Linear starts


def test_three_experts_and_one_for_each_token(world: Path) -> None:
    make_checkpoint(world / "third", "mistral", seed=2)
    arguments = ["merge", "moe", "--base", "base", "--gate", "random", "--output", "moe", "experts_per_token=1"]
    for expert in ("base", "expert", "third"):
        arguments += ["--expert", expert]
    assert cli.run(arguments) == 0
    config = opened("moe").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (3, 1)


def test_a_lora_expert_is_merged_first(world: Path) -> None:
    mixture = opened(mix(shop="lora")).state_dict()
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora").merge_and_unload()
    fused = mixture["model.layers.0.mlp.experts.down_proj"][1]
    torch.testing.assert_close(fused, whole.model.layers[0].mlp.down_proj.weight, rtol=0, atol=1e-6)
    assert not list(Path("moe").glob(".tmp*"))


# -- what lies beside it -----------------------------------------------------------------------------------------------


def test_tokenizer_padding_and_generation_settings_are_the_base_s(world: Path) -> None:
    (world / "base").unlink()
    make_checkpoint(world / "base", "mistral")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.3, "do_sample": True}
    (world / "base" / "generation_config.json").write_text(json.dumps(generation))
    mixture, tokenizer = opened(mix()), AutoTokenizer.from_pretrained("moe")
    before = AutoTokenizer.from_pretrained("base")
    assert (
        (tokenizer.pad_token, tokenizer.padding_side) == (before.pad_token, before.padding_side) == ("<pad>", "right")
    )
    assert (mixture.config.pad_token_id, mixture.config.eos_token_id) == (0, 2)
    settings = mixture.generation_config
    assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.3, True, 2)
    assert mixture.config.sliding_window == 64


def test_bfloat16_stays_bfloat16(world: Path) -> None:
    (world / "base").unlink()
    make_checkpoint(world / "base", "mistral", dtype=torch.bfloat16)
    tensors = load_file(mix(shop="base") / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained("moe", dtype="auto").dtype == torch.bfloat16


def test_it_is_a_run_folder_that_tells_how_much_each_expert_carries(
    world: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    mix()
    run = json.loads(Path("moe/run.json").read_text())
    base, expert = (load_file(Path(name) / "model.safetensors") for name in ("base", "expert"))
    energy = {name: float((expert[name] - base[name]).double().square().sum()) for name in base}
    share = sum(value for name, value in energy.items() if ".mlp." in name) / sum(energy.values())
    assert run["summary"]["carried"] == {"general": None, "shop": pytest.approx(share, rel=1e-5)}
    assert f"{100 * (1 - share):.0f} % of its squared difference to the base is outside its MLPs" in caplog.text
    assert "expert general: is the base" in capsys.readouterr().out
    provenance = json.loads(Path("moe/provenance.json").read_text())
    assert (provenance["stage"], provenance["base"]["path"]) == ("merge", "base")
    assert provenance["inputs"]["expert.shop"] == checkpoint("expert").fingerprint
    assert "A mixture of experts: `base`" in Path("moe/README.md").read_text()


# -- it trains ---------------------------------------------------------------------------------------------------------

STEPS = ["train.max_steps=6", "train.save_steps=6", "train.logging_steps=3", "train.learning_rate=1e-2"]


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_it_trains_and_goes_through_distill_and_align(world: Path, lora: str) -> None:
    mix("--gate", "random", shop="lora")
    make_adapter(world / "teacher", world / "moe", target_modules=["q_proj", "v_proj"])
    more = [*STEPS, f"lora={lora}"]
    assert cli.run(["sft", "--base", "moe", "--data", "shop.jsonl", "--output", "tuned", *more]) == 0
    losses = [line["loss"] for line in metrics_of(Path("tuned")) if "loss" in line]
    assert losses[-1] < losses[0]
    align = ["align", "--base", "moe", "--expert", "teacher", "--domain-data", "shop.jsonl"]
    assert cli.run([*align, "--general-data", "general.jsonl", "--output", "student", *more]) == 0
    divergences = [line["domain/kl"] for line in metrics_of(Path("student")) if "domain/kl" in line]
    assert divergences[-1] < divergences[0]
    distil = ["distill", "--base", "moe", "--teacher", "expert", "--data", "shop.jsonl", "--output", "distilled", *more]
    assert cli.run(distil) == 0
    divergences = [line["train/kl"] for line in metrics_of(Path("distilled")) if "train/kl" in line]
    assert divergences[-1] < divergences[0]
    if lora == "null":
        trained, before = opened("student").state_dict(), opened("moe").state_dict()
        moved = {name for name in before if not torch.equal(trained[name], before[name])}
        assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"} <= moved


def test_a_lora_on_the_mixture_reaches_router_and_experts_and_shares_the_backbone(world: Path) -> None:
    """As `dae sft` makes it: an expert on the mixture, beside a student on the same weights, and merged."""
    mix("--gate", "random")
    tuned = ["sft", "--base", "moe", "--data", "shop.jsonl", "--output", "tuned", "lora.rank=4", *STEPS]
    assert cli.run(tuned) == 0
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("moe"), "tuned")
    trained = {name for name, _ in plain.named_parameters() if "lora_B" in name and ".layers.0." in name}
    assert any(".mlp.gate." in name for name in trained) and any(".mlp.experts." in name for name in trained)
    alone, before = logits_of(plain.eval()), logits_of(opened("moe"))
    assert float((alone - before).abs().max()) > 0.1

    check_adapter("expert", checkpoint("tuned"), checkpoint("moe"))
    backbone = Backbone(checkpoint("moe"), load_model(checkpoint("moe"), LoadSettings(torch.float32)))
    name = add_frozen_adapter(backbone, checkpoint("tuned"))
    add_student_adapter(backbone, LoraRecipe(rank=4))
    for adapter, expected in ((name, alone), (None, before), (STUDENT_ADAPTER, before)):
        with activate(Role("one", backbone.model, adapter)) as model:
            torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)

    merge = ["merge", "weights", "--method", "linear", "--base", "moe", "--expert", "tuned", "--output", "whole"]
    assert cli.run([*merge, "weight=1"]) == 0
    torch.testing.assert_close(logits_of(opened("whole")), alone, rtol=0, atol=1e-4)


def test_a_lora_on_another_mixture_is_refused(world: Path) -> None:
    mix("--gate", "random")
    make_checkpoint(world / "wide", "mixtral", intermediate_size=48)
    make_checkpoint(world / "many", "mixtral", num_local_experts=3)
    for other in ("wide", "many"):
        make_adapter(world / f"on_{other}", world / other)
        with pytest.raises(UserError, match=rf"on_{other}: .*mlp\.experts\..*another base"):
            check_adapter("expert", checkpoint(f"on_{other}"), checkpoint("moe"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["merge", "moe", "--output", "moe", *arguments]) == 2
    assert not Path("moe").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("gate", ["hidden", "cheap_embed"])
def test_gates_from_prompts_want_prompts(world: Path, capsys: pytest.CaptureFixture[str], gate: str) -> None:
    arguments = ["--base", "base", "--expert", "base", "--expert", "expert", "--gate", gate]
    message = refusal(arguments, capsys)
    assert "experts.0.prompts: " in message and f"`{gate}`" in message
    assert "experts.1.prompts: " in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--expert", "base"], "experts: at least two"),
        (["--expert", "base", "--expert", "expert", "--gate", "hiden"], "did you mean `hidden`?"),
        (
            ["--expert", "base", "--expert", "expert", "experts_per_token=3"],
            "experts_per_token=3: ",
        ),
        (["--expert", "a=base", "--expert", "a=expert"], "--expert a=expert: duplicate name `a`"),
        (["--expert", "a=base", "--expert", "expert", "--gate", "random"], "experts.1: "),
        (["--expert", "base", "--expert", "nowhere", "--gate", "random"], "nowhere: "),
        (["--expert", "base", "--expert", "other", "--gate", "random"], "other: is a Qwen3ForCausalLM"),
        (["--base", "lora", "--expert", "base", "--expert", "expert", "--gate", "random"], "base: lora: is an adapter"),
        (["--base", "gpt", "--expert", "gpt", "--expert", "gpt", "--gate", "random"], "base gpt: is a gpt2 model"),
        (
            ["--base", "biased", "--expert", "biased", "--expert", "biased", "--gate", "random"],
            "biased: has biases",
        ),
        (["--base", "mixed", "--expert", "mixed", "--expert", "mixed", "--gate", "random"], "window of 16 tokens"),
    ],
)
def test_wrong_input_is_told(world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    make_checkpoint(world / "other", "qwen3")
    make_checkpoint(world / "gpt", "gpt2")
    make_checkpoint(world / "biased", "llama", attention_bias=True)
    make_checkpoint(world / "mixed", "qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert words in refusal(["--base", "base", *arguments], capsys)


def test_prompts_that_are_all_the_same_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("moe.yaml").write_text("experts: [{path: base, prompts: [a]}, {path: expert, prompts: [a]}]")
    assert "experts.0.prompts: are the same" in refusal(["--recipe", "moe.yaml", "--base", "base"], capsys)


def test_flags_go_over_the_experts_of_the_recipe(world: Path) -> None:
    make_checkpoint(world / "third", "mistral", seed=2)
    recipe = write_recipe()
    arguments = ["merge", "moe", "--recipe", recipe, "--base", "base", "--expert", "shop=third", "--output", "moe"]
    assert cli.run(arguments) == 0
    written = yaml.safe_load(Path("moe/recipe.yaml").read_text())["experts"]
    assert (written["shop"]["path"], written["shop"]["prompts"]) == ("third", PROMPTS["shop"])
    assert written["general"]["path"] == "base"
