"""docs/check-rows.svg: what `dae check` shows of a file with one row of each kind.

    python benchmarks/check_picture.py

Makes a small random checkpoint and the rows in a temporary folder; the picture is the only thing that stays.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dae.checking.check import check
from kd.stages.sft import Sft
from kd.stages.sft_recipe import SftRecipe

PICTURE = Path(__file__).parents[1] / "docs" / "check-rows.svg"
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    "{{ '<call>' + f.name + ' ' + (f.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASK = {"role": "user", "content": "What is the kettle?"}
ANSWER = {"role": "assistant", "content": "9 coins."}
CALL = {"type": "function", "id": "a1", "function": {"name": "price", "arguments": '{"item": "kettle"}'}}
TOOL = {
    "type": "function",
    "function": {"name": "price", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}},
}
ROWS: list[dict[str, Any]] = [
    {"messages": [ASK, {"role": "assistant", "content": "Was <s>12</s>, now 9 coins."}], "id": 1},
    {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": json.dumps([TOOL])},
    {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER], "system": "Be brief."},
    {"messages": [{"role": "developer", "content": "Be brief."}, {**ASK, "name": "Ada"}, ANSWER], "id": 4},
    {"messages": [ASK, {"role": "assistant", "content": "It costs"}], "finish_reason": "length"},
    {"messages": [ASK, ANSWER, ASK, {"role": "assistant", "content": ""}]},
    {"conversations": [{"from": "human", "value": "Price?"}, {"from": "gpt", "value": "9 coins."}]},
    {"instruction": "Give the price.", "input": "kettle", "output": "9 coins."},
    {"prompt": "Price?", "response": " 9 coins."},
    {"prompt": "[INST] Price? [/INST]", "completion": " 9 coins.</s>", "source": "shop"},
    {"prompt": "Price?", "completion": ""},
    {"prompt": "How much is it? " * 90, "completion": " 9 coins."},
    {"text": "The kettle costs 9 coins, and the cup 3. " * 40},
]


def make_checkpoint(folder: Path) -> None:
    """A Llama of two layers with a byte-level tokenizer and a chat template that renders tools."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [json.dumps(row) for row in ROWS],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        make_checkpoint(Path("base"))
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        data = {"max_length": 96, "train": "rows.jsonl"}
        recipe = SftRecipe(base="base", output="expert", data=data, train={"per_device_train_batch_size": 4})
        console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True, highlight=False)
        check(Sft(), recipe, console)
        drawn = console.export_svg(title="dae check sft --base base --data rows.jsonl", unique_id="check")
        # Rich names fonts to be fetched from elsewhere; any will do.
        PICTURE.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL), encoding="utf-8")
        print(f"{PICTURE}")


if __name__ == "__main__":
    main()
