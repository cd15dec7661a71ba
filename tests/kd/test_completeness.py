"""A checkpoint or adapter that does not hold the weights its config describes, all and no others, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import FAMILIES, make_checkpoint, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import make_adapter

from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.compatibility import check_adapter
from kd.models.roles import Backbone, LoadSettings, add_frozen_adapter, load_model

SETTINGS = LoadSettings(torch.float32)
Tensors = dict[str, Tensor]


def edit(weights: Path, change: Callable[[Tensors], Any]) -> None:
    """Write a safetensors file again with its tensors changed."""
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


def edit_config(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(*parts: str) -> Callable[[Tensors], None]:
    """Take away every tensor whose name has one of these parts."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


# -- full checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "mixtral"])
def test_every_family_is_complete_as_it_was_saved(family: str, tied: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied)
    load_model(checkpoint(base), SETTINGS)
    adapter = make_adapter(tmp_path / "adapter", base)
    check_adapter("expert", checkpoint(adapter), checkpoint(base))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", 2)),
        ("gpt2", with_tensor("transformer.h.0.attn.bias", 1, 1, 8, 8)),
        ("gpt2", with_tensor("transformer.h.1.attn.masked_bias")),
    ],
    ids=["rotary", "causal mask", "mask value"],
)
def test_buffers_that_earlier_releases_wrote_are_no_weights(
    family: str, change: Callable[[Tensors], None], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    edit(base / "model.safetensors", change)
    load_model(checkpoint(base), SETTINGS)


def test_a_tied_head_may_be_written_out(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    edit(
        base / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    load_model(checkpoint(base), SETTINGS)


def test_a_padded_vocabulary_in_several_files_is_complete(tmp_path: Path) -> None:
    model = make_model()
    model.resize_token_embeddings(301, pad_to_multiple_of=32)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert load_model(checkpoint(tmp_path / "base"), SETTINGS).get_output_embeddings().weight.shape[0] == 320


def test_a_real_model_is_complete(shared: Path) -> None:
    load_model(checkpoint(shared / "models" / "stories260k"), SETTINGS)


DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a weight is missing": (
        "llama",
        lambda base: edit(base / "model.safetensors", without("layers.1.mlp.up_proj")),
        r"missing: model\.layers\.1\.mlp\.up_proj\.weight\. Save or download it again",
    ),
    "the output layer is missing": (
        "llama",
        lambda base: edit(base / "model.safetensors", without("lm_head")),
        r"missing: lm_head\.weight\.",
    ),
    "both ends are missing": (
        "llama",
        lambda base: edit(base / "model.safetensors", without("lm_head", "embed_tokens")),
        r"missing: lm_head\.weight, model\.embed_tokens\.weight\.",
    ),
    "more layers by the config": (
        "llama",
        lambda base: edit_config(base / "config.json", num_hidden_layers=3, layer_types=None),
        r"missing: model\.layers\.2\.input_layernorm\.weight, .* and 6 more",
    ),
    "fewer layers by the config": (
        "llama",
        lambda base: edit_config(base / "config.json", num_hidden_layers=1, layer_types=None),
        r"unknown: model\.layers\.1\.input_layernorm\.weight, .* and 6 more\. Correct config\.json",
    ),
    "another width by the config": (
        "llama",
        lambda base: edit_config(base / "config.json", intermediate_size=48),
        r"of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(\[16, 32\], not \[16, 48\]\), .* and 3 more",
    ),
    "an expert of a mixture is missing": (
        "mixtral",
        lambda base: edit(base / "model.safetensors", without("experts.1.")),
        r"of another shape: model\.layers\.0\.mlp\.experts\.down_proj \(\[1, 16, 32\], not \[2, 16, 32\]\)",
    ),
    "a part of a mixture's expert is missing": (
        "mixtral",
        lambda base: edit(base / "model.safetensors", without("layers.0.block_sparse_moe.experts.1.w1")),
        r"config\.json: a mixture's experts are stored one by one",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    family, change, told = DAMAGED[damage]
    base = make_checkpoint(tmp_path / "base", family)
    change(base)
    with pytest.raises(UserError, match=rf"^{base}: .*{told}"):
        load_model(checkpoint(base), SETTINGS)


def test_an_adapter_is_no_full_checkpoint(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_checkpoint(tmp_path / "base"))
    with pytest.raises(UserError, match=r"adapter: is an adapter.* merge it"):
        load_model(checkpoint(adapter), SETTINGS)


# -- adapters ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "on the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "on the head": {"target_modules": ["lm_head", "q_proj"]},
    "ranks of its own": {"rank_pattern": {"q_proj": 2}},
    "biases of its own": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_each_kind_are_complete_as_they_were_saved(kind: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    check_adapter("expert", checkpoint(adapter), checkpoint(base))
    add_frozen_adapter(Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS)), checkpoint(adapter))


def test_an_adapter_on_the_experts_of_a_mixture_is_complete(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "mixtral")
    parts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=parts)
    check_adapter("expert", checkpoint(adapter), checkpoint(base))
    edit(adapter / "adapter_model.safetensors", without("layers.1.mlp.experts.lora_B"))
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.experts\.lora_B\.weight"):
        check_adapter("expert", checkpoint(adapter), checkpoint(base))


INCOMPLETE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "half of it": (
        "lora",
        lambda folder: edit(folder / "adapter_model.safetensors", without("layers.1.")),
        r"missing: model\.layers\.1\.mlp\.down_proj\.lora_A\.weight, .* and 11 more",
    ),
    "one factor of two": (
        "lora",
        lambda folder: edit(folder / "adapter_model.safetensors", without("layers.1.mlp.up_proj.lora_B")),
        r"missing: model\.layers\.1\.mlp\.up_proj\.lora_B\.weight\.",
    ),
    "the magnitudes": (
        "dora",
        lambda folder: edit(folder / "adapter_model.safetensors", without("layers.0.mlp.up_proj.lora_magnitude")),
        r"missing: model\.layers\.0\.mlp\.up_proj\.lora_magnitude_vector",
    ),
    "the head that it saved": (
        "head saved",
        lambda folder: edit(folder / "adapter_model.safetensors", without("lm_head")),
        r"missing: lm_head\.weight\.",
    ),
    "the embeddings' factor": (
        "on the embeddings",
        lambda folder: edit(folder / "adapter_model.safetensors", without("lora_embedding_B")),
        r"missing: model\.embed_tokens\.lora_embedding_B\.",
    ),
    "a config with fewer layers": (
        "lora",
        lambda folder: edit_config(folder / "adapter_config.json", target_modules=["q_proj"]),
        r"unknown: model\.layers\.0\.mlp\.down_proj\.lora_A\.weight, .*Correct adapter_config\.json",
    ),
    "a config with another rank": (
        "lora",
        lambda folder: edit_config(folder / "adapter_config.json", r=8),
        r"of another shape: model\.layers\.0\.mlp\.down_proj\.lora_A\.weight \(\[4, 32\], not \[8, 32\]\)",
    ),
    "a config that names no layer": (
        "lora",
        lambda folder: edit_config(folder / "adapter_config.json", target_modules=["nonsense"]),
        r"adapter_config\.json: .*nonsense",
    ),
    "a config of wrong types": (
        "lora",
        lambda folder: edit_config(folder / "adapter_config.json", r="four"),
        r"adapter_config\.json: ",
    ),
    "a config that is no JSON": (
        "lora",
        lambda folder: (folder / "adapter_config.json").write_text("{") and None,
        r"adapter_config\.json: is no JSON",
    ),
    "a config that is a list": (
        "lora",
        lambda folder: (folder / "adapter_config.json").write_text("[]") and None,
        r"adapter_config\.json: is no JSON object",
    ),
}


@pytest.mark.parametrize("damage", INCOMPLETE)
def test_an_adapter_that_is_not_whole_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    kind, change, told = INCOMPLETE[damage]
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    change(adapter)
    with pytest.raises(UserError, match=told):
        check_adapter("expert", checkpoint(adapter), checkpoint(base))
    with pytest.raises(UserError, match=told):
        add_frozen_adapter(Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS)), checkpoint(adapter))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_stands_on_changed_weights_is_refused(start: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    model = get_peft_model(make_model(), LoraConfig(r=2, init_lora_weights=start, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    with pytest.raises(UserError, match=rf"adapter: was begun with init_lora_weights={start}, which changes the base"):
        add_frozen_adapter(backbone, checkpoint(tmp_path / "adapter"))
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    with pytest.raises(UserError, match="changes the base's weights"):
        check_adapter("expert", checkpoint(tmp_path / "adapter"), checkpoint(base))
