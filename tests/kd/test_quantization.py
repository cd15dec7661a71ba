"""Quantised weights: what a layer computes, its gradients, what is refused, how many bytes it takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantised import WIDE, layers_of, quantised, whole_weight, write_dequantised
from pico import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from worlds import make_adapter

from kd.cache.keys import TeacherKey
from kd.config.stage_recipe import LoraRecipe, Quantization
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.forward import final_hidden_states, head_of
from kd.models.line import Pull, start_adapter
from kd.models.quantization import check_quantization, is_quantised, quantised_bytes, quantised_shapes
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    activate,
    add_frozen_adapter,
    add_student_adapter,
    check_head,
    load_model,
)

pytest.importorskip("bitsandbytes")

BOTH: tuple[Quantization, ...] = ("nf4", "int8")
IDS = torch.tensor([[5, 60, 70, 80, 90, 100, 110, 120], [31, 41, 59, 26, 53, 58, 97, 93]])
# Largest difference of gradients to those of the dequantised model, of the largest gradient. Seen: exactly 0 for nf4,
# 1.2e-6 for int8, whose scale is rounded in another order.
TOLERANCE = 1e-5


def adapted(
    base: Path, expert: Path | None = None, quantization: Quantization | None = None
) -> tuple[Role, Role | None]:
    """(student with an adapter that is not 0, expert) on one backbone."""
    torch.manual_seed(0)
    settings = LoadSettings(torch.float32, quantization=quantization)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), settings))
    model = add_student_adapter(backbone, LoraRecipe(rank=4))
    name = None if expert is None else add_frozen_adapter(backbone, checkpoint(expert))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f"lora_B.{STUDENT_ADAPTER}" in key:
                weight.normal_(0, 0.05)
    return Role("student", backbone.model, STUDENT_ADAPTER), None if name is None else Role(
        "expert", backbone.model, name
    )


def gradients(role: Role, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a made-up loss, in train mode."""
    role.model.train()
    hidden = final_hidden_states(role.model, {"input_ids": ids})
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)).sum().backward()
    found = {name: w.grad.clone() for name, w in role.model.named_parameters() if w.grad is not None}
    role.model.zero_grad()
    return found


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-3
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).abs().max()) <= TOLERANCE * largest, name


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_a_layer_computes_with_its_dequantised_weights(family: str, quantization: Quantization, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"n_embd": 64} if family == "gpt2" else WIDE
    base = make_checkpoint(tmp_path / "base", family, **wide)
    model = quantised(base, quantization)
    plain = load_model(
        checkpoint(write_dequantised(base, tmp_path / "whole", quantization)), LoadSettings(torch.float32)
    )
    assert is_quantised(model) and not is_quantised(plain)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        moved = float(
            (load_model(checkpoint(base), LoadSettings(torch.float32))(input_ids=IDS).logits - expected).abs().max()
        )
        assert moved > 1e-3 * float(expected.abs().max())  # rounding the weights does something
        for mode in (False, True, False):
            got = model.train(mode)(input_ids=IDS).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("ids", [IDS, IDS[:1], IDS[:1, :1]], ids=["rows", "one row", "one token"])
@pytest.mark.parametrize("quantization", BOTH)
def test_gradients_of_an_adapter_are_those_on_the_dequantised_model(
    quantization: Quantization, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    expert = make_adapter(tmp_path / "expert", base)
    whole = write_dequantised(base, tmp_path / "whole", quantization)
    # As on a CPU with AVX512-BF16, where bitsandbytes goes over to a layout without gradients after a teacher's pass.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    (student, teacher), (plain, plain_teacher) = adapted(base, expert, quantization), adapted(whole, expert)
    assert teacher is not None and plain_teacher is not None
    hidden = []
    for role in (teacher, plain_teacher):
        with activate(role) as model, torch.no_grad():
            hidden.append(final_hidden_states(model, {"input_ids": ids}))
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)
    assert_near(gradients(student, ids), gradients(plain, ids))


@pytest.mark.parametrize("quantization", BOTH)
def test_an_untouched_student_is_the_reference_to_the_bit(quantization: Quantization, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    backbone = Backbone(checkpoint(base), quantised(base, quantization))
    add_student_adapter(backbone, LoraRecipe(rank=4))
    student, reference = (
        Role(name, backbone.model, adapter) for name, adapter in (("s", STUDENT_ADAPTER), ("r", None))
    )
    student.model.train()
    ours = final_hidden_states(student.model, {"input_ids": IDS})
    with activate(reference) as model, torch.no_grad():
        assert torch.equal(ours, final_hidden_states(model, {"input_ids": IDS}))


@pytest.mark.parametrize("quantization", BOTH)
def test_a_row_does_not_depend_on_its_neighbours(quantization: Quantization, tmp_path: Path) -> None:
    model = quantised(make_checkpoint(tmp_path / "base", **WIDE), quantization)
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(6, 64)
    x[3, 7] = 100.0  # an outlier by LLM.int8, which would take its column out of the rounding for all rows
    torch.testing.assert_close(layer(x)[:3], layer(x[:3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x), x @ whole_weight(layer).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [24, 40, 72])
def test_int8_takes_any_width(width: int, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", hidden_size=width, intermediate_size=width + 10, num_attention_heads=2,
                           num_key_value_heads=1)  # fmt: skip
    model = quantised(base, "int8")
    for layer in layers_of(model).values():
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ whole_weight(layer).T, rtol=1e-5, atol=1e-5)
    check_head(Role("student", model, None), 288)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", BOTH)
def test_the_output_layer_is_never_quantised(quantization: Quantization, tied: bool, tmp_path: Path) -> None:
    model = quantised(make_checkpoint(tmp_path / "base", tie_word_embeddings=tied, **WIDE), quantization)
    assert head_of(model).weight_VD.dtype == torch.float32
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    check_head(Role("student", model, None), 288)


def test_a_dora_expert_is_the_same_on_the_dequantised_model(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    expert = make_adapter(tmp_path / "expert", base, use_dora=True)
    whole = write_dequantised(base, tmp_path / "whole", "nf4")
    hidden = []
    for role in (adapted(base, expert, "nf4")[1], adapted(whole, expert)[1]):
        assert role is not None
        with activate(role) as model, torch.no_grad():
            hidden.append(final_hidden_states(model, {"input_ids": IDS}))
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)


def test_an_expert_with_whole_weights_is_on_no_line_to_a_quantised_base(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    other = make_checkpoint(tmp_path / "other", seed=4, **WIDE)
    for quantization in BOTH:
        student, _ = adapted(base, None, quantization)
        expert = Role("expert.shop", quantised(other, quantization), None)
        with pytest.raises(UserError, match=r"start: expert\.shop: has weights of its own.*dae merge to-lora"):
            start_adapter(student, [Pull(expert, 0.5)])


@pytest.mark.parametrize("quantization", BOTH)
def test_a_start_towards_an_adapter_is_exact(quantization: Quantization, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    student, expert = adapted(base, make_adapter(tmp_path / "expert", base), quantization)
    assert expert is not None
    energy = start_adapter(student, [Pull(expert, 1.0)])
    assert energy.share == 1.0
    with torch.no_grad():
        ours = final_hidden_states(student.model.eval(), {"input_ids": IDS})
        with activate(expert) as model:
            torch.testing.assert_close(ours, final_hidden_states(model, {"input_ids": IDS}), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("value", "quantization", "words"), [
    (float("nan"), "nf4", r"down_proj\.weight contains NaN"), (float("inf"), "int8", r"down_proj\.weight contains NaN"),
    (1e5, "int8", r"quantization: int8: .*has values above 65504; use nf4"),
])  # fmt: skip
def test_bad_weights_are_found_before_they_are_rounded(
    value: float, quantization: Quantization, words: str, tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        quantised(base, quantization)


@pytest.mark.parametrize("quantization", BOTH)
def test_files_that_are_quantised_compute_in_the_same_way(quantization: Quantization, tmp_path: Path) -> None:
    model = quantised(make_checkpoint(tmp_path / "base", **WIDE), quantization)
    model.save_pretrained(tmp_path / "small")
    stored = load_model(checkpoint(tmp_path / "small"), LoadSettings(torch.float32))
    with torch.no_grad():
        for mode in (False, True):
            assert torch.equal(stored.train(mode)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_files_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", **WIDE)
    quantised(base, "nf4").save_pretrained(tmp_path / "small")
    for good in (checkpoint(base), checkpoint(make_adapter(tmp_path / "expert", base))):
        check_quantization("nf4", {"base": good})
    check_quantization(None, {"base": checkpoint(tmp_path / "small")})
    with pytest.raises(UserError, match=r"quantization: nf4: base .*small: its files are quantised already"):
        check_quantization("nf4", {"base": checkpoint(tmp_path / "small")})


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes' kernel for CPUs is at fault")
def test_a_layer_whose_rows_are_no_whole_blocks_is_refused_on_a_cpu(tmp_path: Path) -> None:
    """On CPUs with AVX512 bitsandbytes gives wrong weights for it."""
    base = make_checkpoint(tmp_path / "base", **{**WIDE, "intermediate_size": 96})
    words = r"quantization: nf4: .*base has a layer with 96 inputs, no multiple of 64"
    with pytest.raises(UserError, match=words):
        check_quantization("nf4", {"base": checkpoint(base)})
    with pytest.raises(UserError, match=words):
        quantised(base, "nf4")
    check_quantization("int8", {"base": checkpoint(base)})
    quantised(base, "int8")


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_bytes_are_those_in_memory(family: str, quantization: Quantization, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"n_embd": 64} if family == "gpt2" else WIDE
    base = make_checkpoint(tmp_path / "base", family, **wide)
    model, meta = quantised(base, quantization), checkpoint(base).meta_model()
    layers = layers_of(model).values()
    assert [(layer.out_features, layer.in_features) for layer in layers] == list(quantised_shapes(meta))
    for layer in layers:
        parts = [layer.weight.data]
        parts += [layer.weight.SCB] if quantization == "int8" else [layer.weight.quant_state.absmax,
                                                                     layer.weight.quant_state.code]  # fmt: skip
        assert sum(part.nbytes for part in parts) == quantised_bytes(
            layer.out_features, layer.in_features, quantization
        )


def test_bytes_of_layers_under_adapters(tmp_path: Path) -> None:
    base = checkpoint(make_checkpoint(tmp_path / "base", **WIDE))
    plain = list(quantised_shapes(base.meta_model()))
    meta: Any = base.meta_model()
    backbone = Backbone(base, meta)
    add_student_adapter(backbone, LoraRecipe(rank=4))
    assert list(quantised_shapes(backbone.model)) == plain
    assert len(plain) == sum(type(layer) is nn.Linear for layer in base.meta_model().modules()) - 1


def test_a_quantised_teacher_is_another_one_for_a_cache() -> None:
    plain = TeacherKey("f" * 64, None, "float32", "float32")
    keys = [plain, *(TeacherKey("f" * 64, None, "float32", "float32", quantization=one) for one in BOTH)]
    assert len({key.digest for key in keys}) == 3
    assert plain.digest == "0c13ddeee447bc83"  # if it changes, all caches on disk are filled again


def test_no_warning_of_a_layer_without_gradient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, _ = adapted(make_checkpoint(tmp_path / "base", **WIDE), None, "int8")
    with caplog.at_level(logging.WARNING):
        gradients(student, IDS[:1])
    assert not caplog.records
