"""What all ways of benchmarks/peers.py start from: checkpoints, rows as text, and the recipes of ours.

base/                    a Llama of random weights with a tokenizer whose tokens are bytes
ROUTE.jsonl              prompt and completion of each row: what `dae` reads
mixed.jsonl              the same rows in the order in which `dae align` draws them, with the number of their route
experts/NAME             a LoRA adapter; experts/NAME-merged: the same as a model of its own
align.yaml, one_teacher.yaml, sft.yaml
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peer_setting import Setting
from kd.data.mixing import Mixture, MixtureSource

SEED = 0  # of the order of rows and of the student's adapter, in all ways
SPECIAL = ("<pad>", "<s>", "</s>")


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Write everything; bytes of the base's and of one adapter's weights."""
    setting.write(folder)
    tokenizer = byte_tokenizer()
    base = make_base(setting)
    save(base, tokenizer, folder / "base")
    for index, name in enumerate(setting.expert_names):
        make_expert(setting, folder, name, seed=index + 1)
    rows = write_rows(setting, folder)
    write_mixed(setting, rows, folder / "mixed.jsonl")
    write_recipes(setting, folder)
    adapter = folder / "experts" / setting.expert_names[0] / "adapter_model.safetensors"
    return {"base_bytes": sum(p.numel() * p.element_size() for p in base.parameters()), "adapter_bytes": size(adapter)}


def size(file: Path) -> int:
    return file.stat().st_size


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that rows have known lengths; the models' vocabularies are larger (padded)."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(setting: Setting) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        vocab_size=setting.vocabulary,
        max_position_embeddings=setting.tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=2.0 * setting.width**-0.5)  # logits of deviation 2: not flat
    return base.to(getattr(torch, setting.dtype))


def make_expert(setting: Setting, folder: Path, name: str, seed: int) -> None:
    """An adapter with random weights, and the base with it merged into it, for ways that hold a teacher as a model."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, setting.dtype))
    rank = setting.lora_rank
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    expert = get_peft_model(base, config)
    for parameter_name, parameter in expert.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=setting.expert_std)
    expert.save_pretrained(str(folder / "experts" / name))
    save(expert.merge_and_unload(), byte_tokenizer(), folder / "experts" / f"{name}-merged")


def write_rows(setting: Setting, folder: Path) -> dict[str, list[dict[str, str]]]:
    """ROUTE.jsonl of random letters; the rows by route."""
    letters = random.Random(SEED)

    def text(length: int) -> str:
        return "".join(letters.choices(string.ascii_lowercase, k=length))

    rows = {}
    for route, per_step in setting.routes.items():
        number = max(setting.file_rows, per_step * setting.steps)
        answer = setting.tokens - setting.prompt - 1  # the end token comes to it
        rows[route] = [{"prompt": text(setting.prompt), "completion": text(answer)} for _ in range(number)]
        (folder / f"{route}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[route]))
    return rows


def write_mixed(setting: Setting, rows: dict[str, list[dict[str, str]]], file: Path) -> None:
    """All rows in one file: first those of each step as `dae align` draws them, then the rest."""
    names = list(rows)
    sources = [MixtureSource(name, len(rows[name]), setting.routes[name] / setting.rows) for name in names]
    mixture = Mixture(sources, setting.rows, SEED)
    drawn = [place for step in range(setting.steps) for place in mixture.rows_of_step(step)]
    rest = {(source, row) for source, name in enumerate(names) for row in range(len(rows[name]))} - set(drawn)
    lines = [rows[names[source]][row] | {"route": source} for source, row in [*drawn, *sorted(rest)]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_recipes(setting: Setting, folder: Path) -> None:
    """The recipes of our ways; output and cache are set when they are run."""
    common = {
        "base": str(folder / "base"),
        "seed": SEED,
        "dtype": setting.dtype,
        "lora": {"rank": setting.lora_rank, "alpha": 2 * setting.lora_rank},
        "train": {
            "max_steps": setting.steps,
            "per_device_train_batch_size": setting.rows,
            "learning_rate": setting.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }
    sources = {
        name: {"path": str(folder / f"{name}.jsonl"), "share": per_step / setting.rows}
        for name, per_step in setting.routes.items()
    }
    experts = {name: str(folder / "experts" / name) for name in setting.expert_names}
    align = common | {"start": "base", "expert": experts, "data": {name: [one] for name, one in sources.items()}}
    one_teacher = align | {
        "reference": next(iter(experts.values())),
        "expert": dict.fromkeys(experts, next(iter(experts.values()))),
        "weights": "tokens",
    }
    sft = common | {"data": {"train": list(sources.values())}}
    for name, recipe in {"align": align, "one_teacher": one_teacher, "sft": sft}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
