"""How far the students of benchmarks/starts.py are from the base: KL(base || student) on held-out documents.

    python benchmarks/starts_kl.py      # measures every student at its chosen rate that is scored and has no figure yet
    python benchmarks/starts_kl.py --rates JSON     # at the rates of an earlier record, as in benchmarks/starts.py

In nats per response token: on documents of the general model (what a budget limits), and on those of the domain, which
is what arXiv 2509.04259 predicts forgetting by. Response tokens are those of the right answer, of the answer's text, or
of a story. Real pairs: the documents that no choice was made on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real_pair_scores import SHARED
from benchmarks.starts_ways import GROUPS, Run, chosen, ways_at_rates_of
from benchmarks.tasks.documents import load
from benchmarks.trade_off import DEMOS, LIMIT, VALIDATION_EVERY
from kd.losses.divergences import forward_kl
from kd.runs.files import write_text_durably

Document = tuple[str, str]  # prompt and completion
MAX_TOKENS = 512
WORLD_LIMIT, REAL_LIMIT = 200, 100  # first documents of each task
STORIES = SHARED / "models" / "stories260k"
FILES = {
    "category": ("ecom/heldout_category_mc.jsonl", None),
    "questions": ("ecom/heldout_hetpqa.jsonl", None),
    "stories": ("general/heldout_stories.jsonl", 900),
}


def documents_of(run: Run) -> dict[str, list[Document]]:
    """The documents of both sides: general and domain."""
    if run.way.pair == "world":
        names = {"general KL": ("general, aligned", "general, not aligned"), "domain KL": tuple(GROUPS)[:2]}
        return {
            side: [d for group in groups for d in world_documents(run.seed, group)] for side, groups in names.items()
        }
    return {"general KL": real_documents("stories"), "domain KL": real_documents(run.way.pair)}


def world_documents(seed: int, group: str) -> list[Document]:
    folder = DEMOS / f"seed-{seed}" / "world" / "heldout"
    files = [folder / f"{name}.jsonl" for name in GROUPS[group]]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:WORLD_LIMIT]]
    rows = [json.loads(line) for line in lines]
    return [(row["context"], " " + row["choices"][row["gold"]]) for row in rows]


def real_documents(name: str) -> list[Document]:
    file, first_characters = FILES[name]
    rows = list(load(str(SHARED), file, first_characters)["test"])[:LIMIT]
    kept = [row for i, row in enumerate(rows) if i % VALIDATION_EVERY != VALIDATION_EVERY - 1][:REAL_LIMIT]
    if name == "category":
        return [(row["context"], row["choices"][row["gold"]]) for row in kept]
    return [(row["prompt"], row["completion"]) for row in kept]


def opened(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint as plain transformers and peft open it; an adapter is merged into its base."""
    if (checkpoint / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


@torch.no_grad()
def mean_kl(
    base: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> float:
    """KL(base || student) in nats, mean over all response tokens."""
    total, tokens = 0.0, 0
    for input_ids, response_BT in batches(tokenizer, documents):
        log_p, log_q = (log_softmax(model(input_ids).logits[:, :-1].double(), dim=-1) for model in (base, student))
        asked_BT = response_BT[:, 1:]
        total += float(forward_kl(log_q[asked_BT], log_p[asked_BT]).sum())
        tokens += int(asked_BT.sum())
    return total / tokens


def batches(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], size: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token indices and a mask of the response tokens, [B, T] each; padding on the right changes no token before it."""
    rows = []
    for prompt, completion in documents:
        whole = tokenizer(prompt + completion)["input_ids"][:MAX_TOKENS]
        rows.append((whole, len(tokenizer(prompt)["input_ids"])))
    rows.sort(key=lambda row: len(row[0]))
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        ids_BT = torch.zeros(len(batch), len(batch[-1][0]), dtype=torch.long)
        response_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for i, (ids, prompt_tokens) in enumerate(batch):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
            response_BT[i, prompt_tokens : len(ids)] = True
        yield ids_BT, response_BT


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, metavar="JSON", help="take the rates of this earlier starts.json")
    ways = ways_at_rates_of(parser.parse_args().rates)
    torch.set_num_threads(1)
    rates = ((way, chosen(way)[0]) for way in ways)
    runs = [Run(way, rate, seed) for way, rate in rates if rate is not None for seed in way.seeds]
    for run in (run for run in runs if run.is_scored and not run.kl_file.is_file()):
        in_world = run.way.pair == "world"
        base, tokenizer = opened(DEMOS / f"seed-{run.seed}" / "base" if in_world else STORIES)
        student, _ = opened(run.student)
        found = {side: mean_kl(base, student, tokenizer, documents) for side, documents in documents_of(run).items()}
        run.kl_file.parent.mkdir(parents=True, exist_ok=True)
        write_text_durably(run.kl_file, json.dumps(found) + "\n")
        print(run.way.pair, run.name, *(f"{side} {value:.4f}" for side, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
