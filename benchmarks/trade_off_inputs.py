"""What benchmarks/trade_off.py needs beside the demo and ../shared: validation documents, and smaller students.

python benchmarks/trade_off_inputs.py world DEMO --seed 0   # DEMO/validation and DEMO/small
python benchmarks/trade_off_inputs.py real FOLDER           # the smaller student of the real pair
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.real_pair_scores import SHARED
from dae.demo import vocabulary as words
from dae.demo import world
from dae.demo.world import Quartet, Question
from kd.runs.files import write_text_durably

VALIDATED_SKILLS = tuple(world.DRILLS)
KEPT_LAYERS = (0, 2, 4)  # of the five of stories260k


# -- validation documents of the embedded world ------------------------------------------------------------------------


def validation_documents() -> dict[str, list[Quartet]]:
    """Quartets of every drill and of every aligned kind of shop question; none is a test document.

    Drills: new instances, in no training row either, except sums and differences, of which there are too few. Shop: the
    products and choices of a test quartet, asked in the phrasing that the test does not use for them. Knowledge of
    towns is left out: the test asks it in every phrasing that training rows lack.
    """
    tested = world.documents()
    taken = training_keys()
    drilled = {skill: new_quartets(skill, tested[skill], taken) for skill in VALIDATED_SKILLS}
    return drilled | {kind: [rephrased(kind, quartet) for quartet in tested[kind]] for kind in world.ALIGNED_KINDS}


def training_keys() -> set[str]:
    """The instances of all general training rows but sums, differences and what is known of towns."""
    rows = [
        *world.general_rows("train", world.GENERAL_SKILLS, world.GENERAL_TRAIN_ROWS),
        *world.general_rows("align", world.ALIGNED_SKILLS, world.GENERAL_ALIGN_ROWS),
    ]
    facts = {f"{facts.kind}:{subject}" for facts in world.atlas().values() for subject in facts.values}
    return {row.key for row in rows if row.key not in facts and not is_sum(row)}


def is_sum(question: Question) -> bool:
    return question.key.replace("+", "").replace("-", "").isdigit()


def new_quartets(skill: str, tested: Sequence[Quartet], taken: set[str]) -> list[Quartet]:
    """As many quartets as the test has, of instances that stand neither there nor in `taken`."""
    rng = random.Random(f"{world.SEED}/validation/{skill}")
    seen = {question.key for quartet in tested for question in quartet} | taken
    found: list[Quartet] = []
    while len(found) < len(tested):
        quartet = world.DRILLS[skill](rng)
        keys = {question.key for question in quartet}
        if len(keys) == len(quartet) and not keys & seen:
            one, two, three, four = rng.sample(quartet, 4)
            found.append((one, two, three, four))
            seen |= keys
    return found


def rephrased(kind: str, quartet: Quartet) -> Quartet:
    """The same four facts in the other unseen phrasing."""
    one, two, three, four = (rephrased_question(kind, question) for question in quartet)
    return one, two, three, four


def rephrased_question(kind: str, question: Question) -> Question:
    product = question.key.partition(":")[2]
    asked = [phrasing.format(x=product) for phrasing in words.UNSEEN[kind]]
    (other,) = (prompt for prompt in asked if prompt != question.prompt)
    return Question(other, question.answer, question.key)


def write_validation(folder: Path) -> None:
    """`heldout/NAME.jsonl` as in the world's own folder, and suite.yaml."""
    found = validation_documents()
    for name, quartets in found.items():
        records = [
            {"context": q.prompt, "choices": [each.answer for each in quartet], "gold": gold, "key": q.key}
            for quartet in quartets
            for gold, q in enumerate(quartet)
        ]
        (folder / "heldout").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_text_durably(folder / "heldout" / f"{name}.jsonl", text)
    groups = {
        "domain": [f"world_{name}" for name in found if name in world.ALIGNED_KINDS],
        "general": [f"world_{name}" for name in found if name in world.GENERAL_SKILLS],
    }
    suite = {"shipped": "world", "metadata": {"world": "validation"}, "chat_template": False, "groups": groups}
    write_text_durably(folder / "suite.yaml", yaml.safe_dump(suite, sort_keys=False))


# -- smaller students --------------------------------------------------------------------------------------------------


def save_small_world(folder: Path, seed: int) -> None:
    """A Llama of 0.1 million random weights with the world's tokenizer: a sixth of the demo's base."""
    from dae.demo.model import save_untrained

    save_untrained(folder, seed, width=64, layers=2, initializer_range=0.12)


def save_small_real(base: Path, folder: Path) -> None:
    """The layers KEPT_LAYERS of a checkpoint, with its embeddings, norm and tokenizer."""
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in KEPT_LAYERS])
    model.config.num_hidden_layers = len(KEPT_LAYERS)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def main() -> None:
    """Make what one pair needs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pair", choices=["world", "real"])
    parser.add_argument("folder", type=Path, help="world: what `dae demo` wrote; real: the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="world: of the random weights")
    given = parser.parse_args()
    if given.pair == "world":
        write_validation(given.folder / "validation")
        save_small_world(given.folder / "small", given.seed)
    else:
        save_small_real(SHARED / "models" / "stories260k", given.folder)


if __name__ == "__main__":
    main()
