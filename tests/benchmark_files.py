"""Small MT-Bench and AlpacaEval files in the real formats, with words of our own; and a chat checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pico import make_model, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + TEMPLATE
)

QUESTIONS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (1, "writing", ("Write a line about a kettle.", "Now with nine coins.")),
    (2, "math", ("How much are two and two cups?", "And twice that?")),
    (3, "stem", ("Why is the kettle blue?", "How big is it?")),
    (4, "extraction", ("Name the colours: red green blue.", "Which came last?")),
)

PROMPTS = (
    ("single-v1", "single", "Be a judge.", "Rate it.\nQ: {question}\nA: {answer}"),
    ("single-math-v1", "single", "Be a judge.", "Rate it.\nQ: {question}\nRight: {ref_answer_1}\nA: {answer}"),
    ("single-v1-multi-turn", "single", "Be a judge. Rate the second.",
     "Q1: {question_1}\nA1: {answer_1}\nQ2: {question_2}\nA2: {answer_2}"),
    ("single-math-v1-multi-turn", "single", "Be a judge. Rate the second.",
     "Right: {ref_answer_1} {ref_answer_2}\nQ1: {question_1}\nA1: {answer_1}\nQ2: {question_2}\nA2: {answer_2}"),
    ("pair-v2", "pairwise", "Compare.", "Q: {question}\nAssistant A: {answer_a}\nAssistant B: {answer_b}"),
    ("pair-math-v1", "pairwise", "Compare.",
     "Q: {question}\nRight: {ref_answer_1}\nAssistant A: {answer_a}\nAssistant B: {answer_b}"),
    ("pair-v2-multi-turn", "pairwise", "Compare the second.",
     "Q: {question_1} {question_2}\nAssistant A: {answer_a_1} {answer_a_2}\nAssistant B: {answer_b_1} {answer_b_2}"),
    ("pair-math-v1-multi-turn", "pairwise", "Compare the second.",
     ("Q: {question_1} {question_2}\nRight: {ref_answer_1} {ref_answer_2}\n"
      "Assistant A: {answer_a_1} {answer_a_2}\nAssistant B: {answer_b_1} {answer_b_2}")),
)  # fmt: skip


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_mt_bench(folder: Path) -> Path:
    """question.jsonl, reference.jsonl, judge_prompts.jsonl and answers of a model `ours` and a model `theirs`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / "question.jsonl",
        [{"question_id": number, "category": category, "turns": list(turns)} for number, category, turns in QUESTIONS],
    )
    write_lines(
        folder / "judge_prompts.jsonl",
        [
            {"name": name, "type": kind, "system_prompt": system, "prompt_template": template,
             "output_format": "[[rating]]" if kind == "single" else "[[A]]"}
            for name, kind, system, template in PROMPTS
        ],
    )  # fmt: skip
    write_lines(folder / "reference.jsonl", [answer_row(2, "gold", "four cups", "eight cups")])
    for model in ("ours", "theirs"):
        rows = [answer_row(number, model, f"{model} {number} one", f"{model} {number} two") for number, *_ in QUESTIONS]
        write_lines(folder / f"{model}.jsonl", rows)
    return folder


def answer_row(question_id: int, model: str, *turns: str) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "answer_id": f"a{question_id}",
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": 1.5,
    }


def make_chat_checkpoint(folder: Path, *, seed: int = 0, template: str = TEMPLATE, **config: Any) -> Path:
    """A pico checkpoint whose tokenizer has a chat template."""
    make_model(seed=seed, **config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_alpaca(folder: Path, rows: int = 6) -> Path:
    """instructions.json, and outputs of a model `ours` and a model `theirs`."""
    folder.mkdir(parents=True, exist_ok=True)
    instructions = [{"instruction": f"Say number {row}.", "dataset": f"set{row % 2}"} for row in range(rows)]
    (folder / "instructions.json").write_text(json.dumps(instructions))
    for model in ("ours", "theirs"):
        outputs = [
            {**row, "output": f"{model} says {number}" + "!" * (number if model == "ours" else 2), "generator": model}
            for number, row in enumerate(instructions)
        ]
        (folder / f"{model}.json").write_text(json.dumps(outputs))
    return folder
