"""The ways of benchmarks/peers.py: each a function that trains; it is left by the probe's EnoughError.

Ours run the stages that `dae align` and `dae sft` run, from a recipe file, with one callback more. The others are what
their documentation shows, with what makes them fastest on a CPU: no recomputation of activations (TRL's default), no
mixed precision, no padding, no evaluation, no checkpoint. All read the same rows as text and tokenize them.

Shape legend: B rows, T positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_setting import Setting

MakeProbe = Callable[[], Any]  # called after a way's imports, whose memory it notes
Train = Callable[[Setting, Path, Path, MakeProbe], None]


def ours(stage_name: str, recipe_name: str, *, cached: bool = False, start: str | None = None) -> Train:
    """A way that does what `dae STAGE RECIPE.yaml` does, with the probe among the trainer's callbacks."""

    def train(_setting: Setting, folder: Path, output: Path, make_probe: MakeProbe) -> None:
        from dae.stages import STAGES
        from kd.config.loading import load_recipe
        from kd.stages.run_stage import run_stage

        entry = STAGES[stage_name]
        stage = entry.load()
        probe, callbacks = make_probe(), stage.callbacks
        stage.callbacks = lambda *arguments: [*callbacks(*arguments), probe]  # type: ignore[method-assign]
        flags = {"output": str(output), "cache.path": str(folder / "cache") if cached else None, "start": start}
        run_stage(stage, load_recipe(entry.recipe, folder / f"{recipe_name}.yaml", flags))

    return train


def fill_cache(folder: Path) -> None:
    """What `dae cache align align.yaml` does."""
    from dae.stages import STAGES
    from kd.config.loading import load_recipe
    from kd.stages import caching

    entry = STAGES["align"]
    flags = {"output": str(folder / "unused"), "cache.path": str(folder / "cache")}
    caching.fill_cache(entry.load(), load_recipe(entry.recipe, folder / "align.yaml", flags))


def rows_of(folder: Path) -> Any:
    """The rows as a `datasets.Dataset`, read by `load_dataset` as TRL's documentation does."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(folder / "mixed.jsonl"), split="train")


def tokenized(rows: Any, tokenizer: Any) -> Any:
    """input_ids and labels: the prompt has none, the completion ends with the end token."""

    def encode(row: Mapping[str, Any]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    return rows.map(encode, remove_columns=["prompt", "completion"])


def arguments_of(setting: Setting, output: Path) -> dict[str, Any]:
    """What all peers' TrainingArguments have in common."""
    return {
        "output_dir": str(output),
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.rows,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def lora_config(setting: Setting) -> Any:
    from peft import LoraConfig

    rank = setting.lora_rank
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def load(path: Path, setting: Setting) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, setting.dtype))


def student_of(setting: Setting, folder: Path) -> Any:
    """The base with a new adapter: the same weights as ours, from the same seed."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(0)
    return get_peft_model(load(folder / "base", setting), lora_config(setting))


def trainer_sft(setting: Setting, folder: Path, output: Path, make_probe: MakeProbe) -> None:
    """transformers.Trainer and peft: the least that fine-tuning takes with these libraries."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    probe = make_probe()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    Trainer(
        model=student_of(setting, folder),
        args=TrainingArguments(**arguments_of(setting, output)),
        train_dataset=tokenized(rows_of(folder), tokenizer).remove_columns("route"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[probe],
    ).train()


def three_models(setting: Setting, folder: Path, output: Path, make_probe: MakeProbe) -> None:
    """Student and teachers as models, full logits, written with care.

    Each row passes its own teacher only, and softmax and divergence are taken at response positions only.
    """
    import torch
    from torch.nn import functional
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class ThreeModels(Trainer):
        teachers: Sequence[Any]

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            ids_BT, mask_BT, route_B = inputs["input_ids"], inputs["attention_mask"], inputs["route"]
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            here_BT = inputs["labels"][:, 1:] != -100
            means = []
            for route, teacher in enumerate(self.teachers):
                rows_B = route_B == route
                if not rows_B.any():
                    continue
                with torch.no_grad():
                    out = teacher(input_ids=ids_BT[rows_B], attention_mask=mask_BT[rows_B], use_cache=False)
                    log_q_NV = functional.log_softmax(out.logits[:, :-1][here_BT[rows_B]], dim=-1)
                    del out
                log_p_NV = functional.log_softmax(logits_BTV[here_BT & rows_B[:, None]], dim=-1)
                divergence = functional.kl_div(log_p_NV, log_q_NV, log_target=True, reduction="sum")
                means.append(divergence / len(log_q_NV))
            return torch.stack(means).mean()

    probe = make_probe()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    trainer = ThreeModels(
        model=student_of(setting, folder),
        args=TrainingArguments(**arguments_of(setting, output), remove_unused_columns=False),
        train_dataset=tokenized(rows_of(folder), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[probe],
    )
    paths = [folder / "base", *(folder / "experts" / f"{name}-merged" for name in setting.expert_names)]
    trainer.teachers = [load(path, setting).eval().requires_grad_(False) for path in paths]
    trainer.train()


def trl_arguments(setting: Setting, output: Path) -> dict[str, Any]:
    """TRL recomputes activations and computes in bf16 unless told otherwise."""
    fast = {"gradient_checkpointing": False, "bf16": setting.dtype == "bfloat16", "max_length": None}
    return arguments_of(setting, output) | fast | {"model_init_kwargs": {"dtype": setting.dtype}}


def trl_sft(setting: Setting, folder: Path, output: Path, make_probe: MakeProbe) -> None:
    """TRL tokenizes prompt and completion itself; the loss is on the completion by default."""
    from trl import SFTConfig, SFTTrainer

    probe = make_probe()
    SFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(**trl_arguments(setting, output)),
        train_dataset=rows_of(folder).remove_columns("route"),
        peft_config=lora_config(setting),
        callbacks=[probe],
    ).train()


def trl_gkd(setting: Setting, folder: Path, output: Path, make_probe: MakeProbe) -> None:
    """lmbda 0: the rows' own answers; beta 0: KL(teacher || student). Its default collator reads conversations only."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    probe = make_probe()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    teacher = {"teacher_model_init_kwargs": {"dtype": setting.dtype}}
    GKDTrainer(
        model=str(folder / "base"),
        teacher_model=str(folder / "experts" / f"{setting.expert_names[0]}-merged"),
        args=GKDConfig(**trl_arguments(setting, output), **teacher, lmbda=0.0, beta=0.0, temperature=1.0),
        train_dataset=tokenized(rows_of(folder), tokenizer).remove_columns("route"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        peft_config=lora_config(setting),
        callbacks=[probe],
    ).train()


TRAIN: Mapping[str, Train] = {
    "dae-align": ours("align", "align"),
    "dae-align-cached": ours("align", "align", cached=True),
    "dae-align-auto": ours("align", "align", start="auto"),
    "dae-align-one-teacher": ours("align", "one_teacher"),
    "dae-sft": ours("sft", "sft"),
    "three-models": three_models,
    "trainer-sft": trainer_sft,
    "trl-sft": trl_sft,
    "trl-gkd": trl_gkd,
}
