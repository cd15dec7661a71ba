"""What benchmarks/peers.py varies, and the names of its ways. Imports nothing heavy: a way's imports are its own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """A Llama of random weights, rows of equal length, and a run over them.

    rows: of one optimizer step, which is one micro-batch; one of them for each expert, the others general.
    tokens, prompt: of each row; the prompt has no loss.
    experts: LoRA adapters on the base, each with rows of its own.
    steps: of a run, the first of which is not measured. file_rows: the least rows of each file.
    """

    name: str
    layers: int = 6
    width: int = 288
    mlp: int = 768
    heads: int = 6
    vocabulary: int = 32_000
    rows: int = 8
    tokens: int = 256
    prompt: int = 128
    experts: int = 1
    lora_rank: int = 16
    steps: int = 2
    file_rows: int = 1
    learning_rate: float = 1e-4
    expert_std: float = 0.02  # of the experts' factors B
    dtype: str = "float32"

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(f"domain{index}" for index in range(self.experts))

    @property
    def routes(self) -> dict[str, int]:
        """Route -> its rows in each step."""
        return {"general": self.rows - self.experts, **dict.fromkeys(self.expert_names, 1)}

    def write(self, folder: Path) -> None:
        (folder / "setting.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Setting:
        return cls(**json.loads((folder / "setting.json").read_text()))


SHAPES = {
    "head": Setting("head"),
    "backbone": Setting("backbone", layers=12, width=512, mlp=1376, heads=8, vocabulary=4096),
    "tiny": Setting(
        "tiny",
        layers=2,
        width=16,
        mlp=32,
        heads=2,
        vocabulary=288,
        rows=4,
        tokens=12,
        prompt=5,
        lora_rank=4,
        expert_std=0.2,
    ),
}
SMALL = replace(SHAPES["head"], name="growth", rows=4, tokens=128, prompt=64)


@dataclass(frozen=True)
class Way:
    """loss: ways of one name must have the same losses at every step.

    models: copies of the base's weights that it holds, `per_expert` more for each expert; the student's adapter is one
    more for all. adapters: whether it holds the experts as adapters.
    """

    what: str
    loss: str
    models: int = 1
    per_expert: int = 0
    adapters: bool = False
    needs_trl: bool = False

    def weight_bytes(self, setting: Setting, base: int, adapter: int) -> int:
        """What its weights take. base, adapter: bytes of one copy."""
        copies = self.models + self.per_expert * setting.experts
        return copies * base + (1 + self.adapters * setting.experts) * adapter


NEXT_TOKEN, ROUTED, ONE_TEACHER, FROM_AUTO = "next-token", "routed", "one teacher", "routed, from another start"

WAYS: Mapping[str, Way] = {
    "dae-align": Way("`dae align`, teachers live", ROUTED, adapters=True),
    "dae-align-cached": Way("`dae align` with `cache`, filled beforehand", ROUTED),
    "three-models": Way("Trainer, student and teachers as models", ROUTED, models=2, per_expert=1),
    "dae-sft": Way("`dae sft`", NEXT_TOKEN),
    "trainer-sft": Way("transformers.Trainer and peft", NEXT_TOKEN),
    "trl-sft": Way("TRL SFTTrainer", NEXT_TOKEN, needs_trl=True),
    "dae-align-one-teacher": Way("`dae align`, one expert for all rows", ONE_TEACHER, adapters=True),
    "dae-align-auto": Way("`dae align` with `start=auto`, its default", FROM_AUTO, adapters=True),
    "trl-gkd": Way("TRL GKDTrainer, `lmbda=0`", ONE_TEACHER, models=2, needs_trl=True),
}


FIRST_STEP_ONLY = ("dae-align-auto",)  # its steps are those of dae-align


def available_ways() -> tuple[str, ...]:
    """All ways, without TRL's where it is not installed."""
    has_trl = importlib.util.find_spec("trl") is not None
    return tuple(name for name, way in WAYS.items() if (has_trl or not way.needs_trl) and name not in FIRST_STEP_ONLY)
