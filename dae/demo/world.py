"""The demo's made-up world: general skills, and a shop whose facts occur only in its own rows. One seed decides it all.

Every skill (and every kind of shop question) makes *quartets*: four questions whose four answers are the choices of
each. In held-out documents a quartet shares its choices and their order, and each choice is right exactly once. So any
rule that sees only the choices is right in one document of four: chance is exactly 25 %.

Held out are: of skills (arithmetic, sorting, ...) the instances (`Question.key`), which no training row has; of facts
(towns, products) the phrasing, since the fact itself occurs in training rows in other words.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dae.demo import vocabulary as words

SEED = 2406
PRODUCTS = 200
TOWNS = 120
DOCUMENTS = 240  # held-out documents of each general skill that training rows avoid
MORE, MORE_ARITHMETIC = 720, 480  # further ones of each skill, so that a margin of one point can be decided
GENERAL_TRAIN_ROWS = 110_000
GENERAL_ALIGN_ROWS = 20_000

ALIGNED_SKILLS = ("arithmetic", "sorting", "copying", "reading", "selecting", "regions")
UNALIGNED_SKILLS = ("reversing", "shifting", "crafts")
GENERAL_SKILLS = ALIGNED_SKILLS + UNALIGNED_SKILLS

ALIGNED_KINDS = ("category", "material", "size", "price", "compatibility")
UNALIGNED_KINDS = ("colour", "options")
SHOP_KINDS = ALIGNED_KINDS + UNALIGNED_KINDS
PARTS = {"arithmetic": 3}  # how much of each skill in a mixture, others 1

# Of all files of the default seed. Fixed before `align` first ran on them; CHANGELOG.md lists every change.
SHA256 = "cf817329f5098594f56babfa65a325d566167858019150837b5d8fd68c8ed68c"


def _stream(seed: int, purpose: str) -> random.Random:
    """An independent random stream per purpose, so that a change to one file does not change the others."""
    return random.Random(f"{seed}/{purpose}")


def _names(starts: Sequence[str], ends: Sequence[str], n: int) -> list[tuple[str, str]]:
    """`n` different starts, each with two different ends: two names."""
    rng = _stream(SEED, "names")
    return [(start + one, start + other) for start in rng.sample(starts, n) for one, other in (rng.sample(ends, 2),)]


TOWN_NAMES = [name for name, _ in _names(words.TOWN_STARTS, words.TOWN_ENDS, TOWNS)]
PRODUCT_NAMES, PLAIN_NAMES = map(list, zip(*_names(words.NAME_STARTS, words.NAME_ENDS, PRODUCTS), strict=True))
# Plain names are for copying and belong to no product: the base knows the parts of product names, not the names.


@dataclass(frozen=True)
class Question:
    """One question, its right answer, and its instance or fact (`key`), independent of the phrasing."""

    prompt: str
    answer: str
    key: str


Quartet = tuple[Question, Question, Question, Question]
Drill = Callable[[random.Random], Quartet]


def _ask(rng: random.Random, form: str, answer: str, key: str, **fields: str) -> Question:
    return Question(rng.choice(words.GENERAL_PHRASINGS[form]).format(**fields), answer, key)


def _quartet(questions: Sequence[Question]) -> Quartet:
    one, two, three, four = questions
    assert len({question.answer for question in questions}) == 4, questions
    return one, two, three, four


# --- skills: any number of instances ---


def arithmetic(rng: random.Random) -> Quartet:
    """Sums and differences of numbers below 50; the four results are close (s, s+-1, s+-10, s+-11)."""
    step, decade = rng.choice((-1, 1)), rng.choice((-10, 10))
    result = rng.randint(12, 87)
    questions = []
    for target in (result, result + step, result + decade, result + step + decade):
        if target < 49 and rng.random() < 0.5:
            b = rng.randint(1, 49 - target)
            a = target + b
            questions.append(_ask(rng, "difference", str(target), f"{a}-{b}", a=str(a), b=str(b)))
        else:
            a = rng.randint(max(0, target - 49), min(49, target))
            b = target - a
            questions.append(_ask(rng, "sum", str(target), f"{min(a, b)}+{max(a, b)}", a=str(a), b=str(b)))
    return _quartet(questions)


def sorting(rng: random.Random) -> Quartet:
    """Four numbers in rising and falling order, and the same with one of them replaced."""
    numbers = rng.sample(range(10, 100), 5)
    questions = []
    for chosen in (numbers[:4], numbers[1:]):
        for form in ("up", "down"):
            shown = " ".join(map(str, rng.sample(chosen, 4)))
            answer = " ".join(map(str, sorted(chosen, reverse=form == "down")))
            questions.append(_ask(rng, form, answer, f"{form}:{shown}", items=shown))
    return _quartet(questions)


def copying(rng: random.Random) -> Quartet:
    """Repeat four orders of the same four made-up names."""
    names = rng.sample(PLAIN_NAMES, 4)
    orders = rng.sample(list(itertools.permutations(names)), 4)
    return _quartet([_ask(rng, "copy", " ".join(o), "copy:" + " ".join(o), items=" ".join(o)) for o in orders])


def reversing(rng: random.Random) -> Quartet:
    """Reverse four orders of the same four words."""
    orders = rng.sample(list(itertools.permutations(rng.sample(words.COMMON, 4))), 4)
    return _quartet(
        [_ask(rng, "reverse", " ".join(o[::-1]), "reverse:" + " ".join(o), items=" ".join(o)) for o in orders]
    )


def reading(rng: random.Random) -> Quartet:
    """Four short reports that differ in everything, and one question for all: who, what, which colour, or where?"""
    columns = [rng.sample(values, 4) for values in (words.PEOPLE, words.COLOURS, words.THINGS, words.REGIONS)]
    reports = list(zip(*columns, strict=True))
    asked = rng.randrange(4)
    form = ("who", "colour", "what", "where")[asked]
    questions = []
    for person, colour, thing, region in reports:
        fields = {"person": person, "colour": colour, "thing": thing, "region": region}
        report = rng.choice(words.REPORTS).format(**fields)
        answer = (person, colour, thing, region)[asked]
        questions.append(_ask(rng, form, answer, f"{form}:{report}", report=report))
    return _quartet(questions)


def selecting(rng: random.Random) -> Quartet:
    """The largest, smallest, first and last of six numbers, which are four different numbers."""
    numbers = rng.sample(range(10, 100), 6)
    while len({max(numbers), min(numbers), numbers[0], numbers[-1]}) < 4:
        rng.shuffle(numbers)
    items = " ".join(map(str, numbers))
    answers = {"largest": max(numbers), "smallest": min(numbers), "first": numbers[0], "last": numbers[-1]}
    return _quartet([_ask(rng, form, str(n), f"{form}:{items}", items=items) for form, n in answers.items()])


def shifting(rng: random.Random) -> Quartet:
    """Replace each letter by the next one of the alphabet, in four orders of the same four letters."""
    letters = rng.sample(string.ascii_lowercase[:-1], 4)
    orders = rng.sample(list(itertools.permutations(letters)), 4)
    after = dict(itertools.pairwise(string.ascii_lowercase))
    return _quartet(
        [
            _ask(rng, "shift", " ".join(after[x] for x in order), "shift:" + " ".join(order), items=" ".join(order))
            for order in orders
        ]
    )


# --- knowledge: a fixed list of facts ---


@dataclass(frozen=True)
class Facts:
    """All facts of one kind: the value of each subject (a town, a product)."""

    kind: str
    values: dict[str, str]

    def questions(self, rng: random.Random, subject: str, phrasings: Sequence[str]) -> list[Question]:
        """The subject's fact in each of the phrasings; options are drawn again for each."""
        right = self.values[subject]
        wrong = sorted(set(self.values.values()) - {right})
        questions = []
        for phrasing in phrasings:
            offered = rng.sample([right, *rng.sample(wrong, 3)], 4)
            questions.append(self.question(subject, phrasing, offered))
        return questions

    def question(self, subject: str, phrasing: str, offered: Sequence[str]) -> Question:
        """The subject's fact in one phrasing, which may name the four values in `offered`."""
        fields = dict(zip("abcd", offered, strict=True))
        return Question(phrasing.format(x=subject, **fields), self.values[subject], f"{self.kind}:{subject}")

    def quartets(self, rng: random.Random, phrasings: Sequence[str]) -> list[Quartet]:
        """Every subject once, in quartets with four different values, each quartet in one of the phrasings.

        No subject is among the choices of its own quartet (a match's name would give itself away).
        """
        quarter = len(self.values) // 4
        while True:
            values = sorted(set(self.values.values()))
            rank = {value: i for i, value in enumerate(rng.sample(values, len(values)))}
            # Sorted by value, and no value has more than a quarter: subjects a quarter apart differ in value.
            ordered = sorted(rng.sample(sorted(self.values), 4 * quarter), key=lambda x: rank[self.values[x]])
            groups = [rng.sample(ordered[i::quarter], 4) for i in range(quarter)]
            if not any({self.values[x] for x in group} & set(group) for group in groups):
                break
        quartets = []
        for i, group in enumerate(groups):
            offered = [self.values[x] for x in group]
            phrasing = phrasings[i % len(phrasings)]
            quartets.append(_quartet([self.question(x, phrasing, offered) for x in group]))
        return quartets


def _deal(rng: random.Random, subjects: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """Give each subject a value; all values equally often (up to one)."""
    hand = list(itertools.islice(itertools.cycle(rng.sample(values, len(values))), len(subjects)))
    rng.shuffle(hand)
    return dict(zip(subjects, hand, strict=True))


def atlas(seed: int = SEED) -> dict[str, Facts]:
    """General knowledge: region and craft of every town, by skill."""
    rng = _stream(seed, "atlas")
    return {
        "regions": Facts("region", _deal(rng, TOWN_NAMES, words.REGIONS)),
        "crafts": Facts("craft", _deal(rng, TOWN_NAMES, words.CRAFTS)),
    }


def catalogue(seed: int = SEED) -> dict[str, Facts]:
    """The shop's facts by kind of question. `options` asks for the material and offers four."""
    rng = _stream(seed, "catalogue")
    dealt = {
        "category": words.CATEGORIES,
        "material": words.MATERIALS,
        "size": words.SIZES,
        "price": words.PRICES,
        "colour": words.COLOURS,
    }
    facts = {kind: Facts(kind, _deal(rng, PRODUCT_NAMES, values)) for kind, values in dealt.items()}
    shuffled = rng.sample(PRODUCT_NAMES, PRODUCTS)
    pairs = list(zip(shuffled[::2], shuffled[1::2], strict=True))
    matches = dict(pairs) | {b: a for a, b in pairs}
    facts["compatibility"] = Facts("compatibility", {name: matches[name] for name in PRODUCT_NAMES})
    facts["options"] = Facts("options", facts["material"].values)
    return {kind: facts[kind] for kind in SHOP_KINDS}


# --- files ---

DRILLS: dict[str, Drill] = {
    "arithmetic": arithmetic,
    "sorting": sorting,
    "copying": copying,
    "reading": reading,
    "selecting": selecting,
    "reversing": reversing,
    "shifting": shifting,
}


def _drill_documents(drill: Drill, rng: random.Random, n: int, taken: set[str]) -> list[Quartet]:
    """Held-out quartets of a skill with `n` questions, without duplicates and instances in `taken`."""
    quartets: list[Quartet] = []
    seen = set(taken)
    while len(quartets) < n // 4:
        quartet = drill(rng)
        keys = {question.key for question in quartet}
        if len(keys) == 4 and not keys & seen:
            quartets.append(_quartet(rng.sample(quartet, 4)))
            seen |= keys
    return quartets


def _drill_rows(drill: Drill, rng: random.Random, held_out: set[str]) -> Iterator[Question]:
    """An endless stream of a skill's training questions, without held-out instances."""
    while True:
        yield from (question for question in drill(rng) if question.key not in held_out)


def _fact_rows(facts: Facts, rng: random.Random) -> Iterator[Question]:
    """An endless stream of the facts in all taught phrasings, each pass in another order."""
    while True:
        asked = [q for x in facts.values for q in facts.questions(rng, x, words.TAUGHT[facts.kind])]
        yield from rng.sample(asked, len(asked))


def documents(seed: int = SEED) -> dict[str, list[Quartet]]:
    """The held-out quartets that training rows avoid, by skill and kind of shop question."""
    quartets = {
        name: _drill_documents(drill, _stream(seed, f"documents/{name}"), DOCUMENTS, set())
        for name, drill in DRILLS.items()
    }
    for name, facts in atlas(seed).items():
        rng = _stream(seed, f"documents/{name}")
        quartets[name] = [q for phrasing in words.UNSEEN[facts.kind] for q in facts.quartets(rng, (phrasing,))]
    for kind, facts in catalogue(seed).items():
        quartets[kind] = facts.quartets(_stream(seed, f"documents/{kind}"), words.UNSEEN[kind])
    return {name: quartets[name] for name in GENERAL_SKILLS + SHOP_KINDS}


def more_arithmetic(seed: int = SEED) -> list[Quartet]:
    """Further held-out quartets of arithmetic. Its instances are few: training rows must leave these out, too."""
    taken = {question.key for quartet in documents(seed)["arithmetic"] for question in quartet}
    return _drill_documents(arithmetic, _stream(seed, "documents/more/arithmetic"), MORE_ARITHMETIC, taken)


def more_documents(trained: set[str], seed: int = SEED) -> dict[str, list[Quartet]]:
    """Further quartets of each general skill: new instances, which are neither in `trained` nor among `documents`.

    Of knowledge, every fact in every unseen phrasing again, among other choices: there are no other facts.
    """
    held_out = documents(seed)
    found = {"arithmetic": more_arithmetic(seed)}
    for name, drill in DRILLS.items():
        if name != "arithmetic":
            taken = trained | {question.key for quartet in held_out[name] for question in quartet}
            found[name] = _drill_documents(drill, _stream(seed, f"documents/more/{name}"), MORE, taken)
    for name, facts in atlas(seed).items():
        rng = _stream(seed, f"documents/more/{name}")
        rounds = range(MORE // DOCUMENTS)
        found[name] = [q for _ in rounds for form in words.UNSEEN[facts.kind] for q in facts.quartets(rng, (form,))]
    return found


def general_rows(purpose: str, skills: Sequence[str], n: int, seed: int = SEED) -> list[Question]:
    """About `n` training questions, shuffled: three parts of arithmetic, the hardest skill, one of each other."""
    held_out, towns = documents(seed), atlas(seed)
    rows: list[Question] = []
    parts = sum(PARTS.get(skill, 1) for skill in skills)
    for skill in skills:
        rng = _stream(seed, f"{purpose}/{skill}")
        if skill in towns:
            supply = _fact_rows(towns[skill], rng)
        else:
            more = more_arithmetic(seed) if skill == "arithmetic" else []
            supply = _drill_rows(DRILLS[skill], rng, {q.key for quartet in (*held_out[skill], *more) for q in quartet})
        rows += itertools.islice(supply, n * PARTS.get(skill, 1) // parts)
    return _stream(seed, purpose).sample(rows, len(rows))


def shop_rows(kinds: Sequence[str], seed: int = SEED) -> list[Question]:
    """Every fact of these kinds in every taught phrasing, once each, shuffled.

    A kind's rows do not depend on the other kinds.
    """
    facts = catalogue(seed)
    rows = [
        question
        for kind in kinds
        for rng in (_stream(seed, f"shop/{kind}"),)
        for product in facts[kind].values
        for question in facts[kind].questions(rng, product, words.TAUGHT[kind])
    ]
    return _stream(seed, "shop").sample(rows, len(rows))


def files(seed: int = SEED) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Name and JSON records of every file of the world."""
    training = {
        "general_train.jsonl": general_rows("train", GENERAL_SKILLS, GENERAL_TRAIN_ROWS, seed),
        "general_align.jsonl": general_rows("align", ALIGNED_SKILLS, GENERAL_ALIGN_ROWS, seed),
        "shop_expert.jsonl": shop_rows(SHOP_KINDS, seed),
        "shop_align.jsonl": shop_rows(ALIGNED_KINDS, seed),
    }
    for name, rows in training.items():
        yield name, [{"prompt": row.prompt, "completion": f" {row.answer}"} for row in rows]
    more = more_documents({row.key for rows in training.values() for row in rows}, seed)
    for name, quartets in documents(seed).items():
        yield f"heldout/{name}.jsonl", list(_records([*quartets, *more.get(name, ())]))


def _records(quartets: Sequence[Quartet]) -> Iterator[dict[str, object]]:
    for quartet in quartets:
        choices = [question.answer for question in quartet]
        for gold, question in enumerate(quartet):
            yield {"context": question.prompt, "choices": choices, "gold": gold, "key": question.key}


def write_world(folder: Path, seed: int = SEED) -> str:
    """Write all files under `folder`; return the SHA-256 over their names and contents, in order."""
    digest = hashlib.sha256()
    for name, records in files(seed):
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
