"""Memory of each GPU and bytes sent in a step, for 7B, 2x7B and 70B on 1, 8 and 64 GPUs, as `dae check` estimates them.

    python benchmarks/scaling.py             # prints the tables; --write writes benchmarks/results/scaling.md

Models are made on the meta device from their configs: no weights, no GPU. Nothing here was measured on a GPU. That the
formulas are what accelerate and torch do is tested with small models (tests/dae/test_scaling.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig

from dae.alignment import Align
from dae.checking.check import in_words
from dae.checking.estimates import Item, memory, parameters
from dae.checking.plan import Plan
from dae.checking.processes import Scaling
from dae.checking.scaling import communication, scaled_memory
from dae.recipe import AlignRecipe
from kd.data.token_rows import TokenRows
from kd.models.roles import STUDENT_ADAPTER, LoadSettings, Role
from kd.stages.stage import StageRoles
from kd.training.settings import training_arguments

RESULT = Path("benchmarks/results/scaling.md")
RANK, TOKENS, PER_MACHINE = 64, 2048, 8
_OF_7B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "7B": MistralConfig(**_OF_7B),
    "2x7B": MixtralConfig(**_OF_7B, num_local_experts=2, num_experts_per_tok=2),
    "70B": LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
}
WAYS = tuple(Scaling(processes, plan) for plan in ("ddp", "fsdp2") for processes in (8, 64))


@dataclass(frozen=True)
class Case:
    """A run: a LoRA student and an expert adapter on a backbone, and its reference."""

    model: str
    separate_reference: bool = False

    @property
    def title(self) -> str:
        return f"{self.model}, another {self.model} as reference" if self.separate_reference else self.model


CASES = (Case("7B"), Case("2x7B"), Case("70B"), Case("70B", separate_reference=True))


def on_meta(model: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[model]).requires_grad_(False)


@cache
def plan_of(case: Case) -> Plan:
    """What `dae check` plans for it, without checkpoints and rows."""
    train = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": True}
    values: dict[str, Any] = {"base": "BASE", "expert": "EXPERT", "output": "STUDENT", "dtype": "bfloat16"}
    rows = {"general": "general.jsonl", "domain": "domain.jsonl"}
    recipe = AlignRecipe(**values, data=rows, lora={"rank": RANK}, train=train)
    student, expert = (LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear") for _ in range(2))
    with torch.device("meta"):
        model = PeftModel(on_meta(case.model), student, STUDENT_ADAPTER)
        model.add_adapter("expert", expert)
    for name, weight in model.named_parameters():
        weight.requires_grad_(STUDENT_ADAPTER in name.split("."))
    reference = Role("reference", on_meta(case.model) if case.separate_reference else model, None)
    teachers = {"reference": reference, "expert.domain": Role("expert.domain", model, "expert")}
    roles = StageRoles(Role("student", model, STUDENT_ADAPTER), teachers, model)
    settings = LoadSettings(torch.bfloat16, device="cpu")
    data: Any = SimpleNamespace(rows=[TokenRows.from_rows([([0] * TOKENS, [False] * TOKENS)])])
    nothing: Any = None
    return Plan(
        recipe=recipe,
        inputs={},
        data=data,
        args=training_arguments(recipe, settings),
        settings=LoadSettings(torch.bfloat16, device="cuda"),
        mixture=nothing,
        steps=1,
        roles=roles,
        objective=Align().objective(recipe, roles),
        cache={},
    )


def together(items: Sequence[Item]) -> str:
    return in_words(sum(item.bytes for item in items))


def read_by_each(case: Case) -> float:
    """Bytes of the checkpoints that every process reads into the machine's memory before it splits them."""
    models = {id(role.model): role.model for role in plan_of(case).roles.all}.values()
    return sum(parameters(model) * torch.bfloat16.itemsize for model in models)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> list[str]:
    return [row(*cells), f"|{'---|' * len(cells)}"]


def memory_table() -> str:
    lines = header("memory of a GPU", "1 GPU", *(f"{way.name}, each of {way.processes}" for way in WAYS))
    for case in CASES:
        plan = plan_of(case)
        lines.append(row(case.title, together(memory(plan)), *(together(scaled_memory(plan, way)) for way in WAYS)))
    return "\n".join(lines)


def communication_table() -> str:
    lines = header("sent by a GPU in a step", *(f"{way.name}, each of {way.processes}" for way in WAYS))
    for case in CASES:
        lines.append(row(case.title, *(together(communication(plan_of(case), way)) for way in WAYS)))
    return "\n".join(lines)


def host_table() -> str:
    lines = header("the machine's memory while loading", "each process", f"{PER_MACHINE} processes on one machine")
    for case in CASES:
        each = read_by_each(case)
        lines.append(row(case.title, in_words(each), in_words(PER_MACHINE * each)))
    return "\n".join(lines)


def parts_table(case: Case) -> str:
    """Every part of the memory under FSDP2, then of what is sent."""
    plan, ways = plan_of(case), [way for way in WAYS if way.plan == "fsdp2"]
    alone, columns = memory(plan), [scaled_memory(plan, way) for way in ways]
    lines = header(f"{case.title}, FSDP2", "1 GPU", *(f"each of {way.processes}" for way in ways))
    for index, items in enumerate(zip(*columns, strict=True)):
        one = in_words(alone[index].bytes) if index < len(alone) else ""
        lines.append(row(items[0].name, one, *(in_words(item.bytes) for item in items)))
    for items in zip(*(communication(plan, way) for way in ways), strict=True):
        lines.append(row(f"sent: {items[0].name}", "", *(in_words(item.bytes) for item in items)))
    return "\n".join(lines)


def result() -> str:
    counts = ", ".join(f"{name} {parameters(plan_of(Case(name)).roles.student.model):,}" for name in CONFIGS)
    setting = (
        f"LoRA rank {RANK} on all linear layers, expert adapter of the same rank,\nreference = base unless said; bf16, "
        f"1 row of {TOKENS:,} tokens on each GPU, one micro-batch a step, gradient checkpointing."
    )
    return "\n\n".join(
        [
            "# Memory and communication on 1, 8 and 64 GPUs",
            f"Estimated on the meta device, not measured. {setting}\nParameters without adapters: {counts}.",
            memory_table(),
            communication_table(),
            host_table(),
            *(parts_table(case) for case in CASES),
            "",
        ]
    ).removesuffix("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT}")
    if parser.parse_args().write:
        RESULT.write_text(result())
    else:
        print(result())


if __name__ == "__main__":
    main()
