"""Tokenizers of every kind, made on the fly, chat templates with the quirks of known ones, and rows in them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.examples import encode_record, load_rows
from kd.data.token_rows import TokenRow

CORPUS = [
    "Question: what is it? Answer: a red cup, yes. No.\n\n",
    "the user asks and the assistant replies hello world\n",
] * 8
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|end_of_turn|>", "<|end|>", "<|user|>", "<|assistant|>", "<|end_of_text|>", "<|start_of_role|>",
    "<|end_of_role|>",
)  # fmt: skip

SPECIAL = ["<unk>", "<s>", "</s>"]

TRIMS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KEEPS = TRIMS.replace(" | trim", "")
NO_END = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Old turns lose their reasoning, as in templates of reasoning models.
DROPS_REASONING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The question opens the reasoning, the history never shows it.
OPENS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TRIMS
)
SPACE_IN_HEADER = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def learnt_pieces(core: Tokenizer, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(core.to_str())["model"]
    return learnt["vocab"], [tuple(merge) for merge in learnt["merges"]]


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    return tokenizer


def byte_level(trim_offsets: bool | None = None) -> PreTrainedTokenizerFast:
    """GPT-2 style: a space belongs to the word after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    learnt_pieces(core, pre_tokenizers.ByteLevel.alphabet())
    if trim_offsets is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return wrapped(core)


def metaspace(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """sentencepiece style: a text begins with a space, and what was never seen is written in bytes."""
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    teacher = Tokenizer(models.BPE(unk_token="<unk>"))
    teacher.pre_tokenizer = pre_tokenizers.Metaspace()
    vocabulary, merges = learnt_pieces(teacher, [])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = split
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(core)


def words_only() -> PreTrainedTokenizerFast:
    """A tokenizer that drops white space, as small synthetic worlds use."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    core.train_from_iterator(
        ["Question: red? assistant: user: yes"], trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


KINDS = {
    "byte-level": byte_level(),
    "byte-level, offsets trimmed": byte_level(trim_offsets=True),
    "metaspace": metaspace(),
    "metaspace, no BOS": metaspace(adds_bos=False),
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerBase:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    copy.chat_template = template
    return copy


def real_template(shared: Path, name: str) -> str:
    return (shared / "templates" / f"{name}.jinja").read_text(encoding="utf-8").replace("    ", "").replace("\n", "")


# A template that renders tools, calls and their results: arguments as an object, or as the text that they come as.
TOOLS_AS_OBJECT = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    "{{ '<call>' + f.name + ' ' + (f.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS_AS_TEXT = TOOLS_AS_OBJECT.replace("(f.arguments | tojson)", "f.arguments")
TOOLS_EITHER = TOOLS_AS_OBJECT.replace(
    "(f.arguments | tojson)", "(f.arguments if f.arguments is string else f.arguments | tojson)"
)
# One parameter after another, as in templates for code models.
TOOLS_BY_PART = TOOLS_AS_OBJECT.replace(
    "{{ '<call>' + f.name + ' ' + (f.arguments | tojson) + '</call>' }}",
    "{{ '<call>' + f.name }}{% for k, v in f.arguments.items() %}{{ '<' + k + '>' + v + '</' + k + '>' }}{% endfor %}"
    "{{ '</call>' }}",
)


def chat(*contents: str, system: str | None = None) -> dict:
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def encoded(record: dict, tokenizer: PreTrainedTokenizerBase, **keys: object) -> TokenRow:
    row = encode_record(record, tokenizer, DataRecipe(**keys), "rows.jsonl:7")
    assert isinstance(row, TokenRow), row
    assert not row.response_mask[0]
    assert len(row.input_ids) == len(row.response_mask)
    return row


def responses(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of response tokens, decoded with what comes before it, so that its spaces stay."""
    runs, begin = [], None
    for t, is_response in enumerate([*row.response_mask, False]):
        if is_response and begin is None:
            begin = t
        elif not is_response and begin is not None:
            runs.append(tokenizer.decode(row.input_ids[:t])[len(tokenizer.decode(row.input_ids[:begin])) :])
            begin = None
    return runs


def told_notes(path: Path, records: list[dict], tokenizer: PreTrainedTokenizerBase, **keys: object):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (rows,), (report,) = load_rows([SourceRecipe(path=str(path))], tokenizer, DataRecipe(**keys))
    return rows, report
