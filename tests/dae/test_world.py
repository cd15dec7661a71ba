"""The embedded world is what its module says: fixed, fair, free of leaks and of shortcuts through the answers."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dae.demo import vocabulary as words
from dae.demo import world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    digest = world.write_world(folder)
    assert digest == world.SHA256, "the world has changed: CHANGELOG.md, before and after"
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def held_out(folder: Path, name: str) -> list[dict]:
    return read(folder / "heldout" / f"{name}.jsonl")


def test_another_seed_is_another_world(folder: Path, tmp_path: Path) -> None:
    assert world.write_world(tmp_path, seed=1) != world.SHA256
    assert {p.name for p in tmp_path.rglob("*.jsonl")} == {p.name for p in folder.rglob("*.jsonl")}


@pytest.mark.parametrize("name", world.GENERAL_SKILLS + world.SHOP_KINDS)
def test_no_rule_over_the_choices_beats_chance(folder: Path, name: str) -> None:
    documents = held_out(folder, name)
    assert len(documents) >= 200
    golds = defaultdict(Counter)
    for document in documents:
        assert len(set(document["choices"])) == 4
        golds[tuple(document["choices"])][document["gold"]] += 1
    # A rule sees only the choices. For each set of choices, all four positions are right equally often.
    assert all(set(counts) == {0, 1, 2, 3} and len(set(counts.values())) == 1 for counts in golds.values())


@pytest.mark.parametrize("name", world.GENERAL_SKILLS + world.SHOP_KINDS)
def test_no_held_out_question_stands_in_training_rows(folder: Path, name: str) -> None:
    documents = held_out(folder, name)
    questions = [document["context"] for document in documents]
    # Facts are few: their questions come again, among other choices.
    asked = [(d["context"], *d["choices"]) for d in documents] if name in world.atlas() else questions
    assert len(set(asked)) > 0.95 * len(asked)
    assert name in world.atlas() or len(set(asked)) == len(asked)
    for file in ("general_train", "general_align", "shop_expert", "shop_align"):
        assert not {row["prompt"] for row in read(folder / f"{file}.jsonl")} & set(questions)


def test_no_held_out_instance_stands_in_training_rows_in_other_words() -> None:
    quartets = world.documents()
    for skills in (world.GENERAL_SKILLS, world.ALIGNED_SKILLS):
        keys = {row.key for row in world.general_rows("train", skills, 20_000)}
        for name in world.DRILLS:
            assert not keys & {question.key for quartet in quartets[name] for question in quartet}


def test_further_documents_follow_the_first_ones_and_are_in_no_training_row(folder: Path) -> None:
    trained = {row["prompt"] for name in ("train", "align") for row in read(folder / f"general_{name}.jsonl")}
    first, numbers = world.documents(), re.compile(r"\d+")
    sums = {tuple(sorted(numbers.findall(prompt))) for prompt in trained if "+" in prompt}
    for name in world.GENERAL_SKILLS:
        documents = held_out(folder, name)
        keys = [question.key for quartet in first[name] for question in quartet]
        assert [document["key"] for document in documents[: world.DOCUMENTS]] == keys
        more = world.MORE_ARITHMETIC if name == "arithmetic" else world.MORE
        assert len(documents) == world.DOCUMENTS + more
        assert not {document["context"] for document in documents} & trained
        if name in world.DRILLS:
            assert len({document["key"] for document in documents}) == len(documents)
        if name == "arithmetic":
            asked = {tuple(sorted(numbers.findall(d["context"]))) for d in documents if "+" in d["key"]}
            assert not asked & sums


def test_a_sum_has_one_key_in_both_orders() -> None:
    assert not [q.key for row in world.documents()["arithmetic"] for q in row if "+" in q.key and _descends(q.key)]


def _descends(key: str) -> bool:
    a, b = map(int, key.split("+"))
    return a > b


def test_alignment_rows_leave_out_what_they_should(folder: Path) -> None:
    def kinds(prompts: list[str], names: tuple[str, ...]) -> set[str]:
        phrasings = {k: [re.sub(r"\\{\w\\}", r"[\\w -]+", re.escape(p)) for p in words.TAUGHT[k]] for k in names}
        return {k for k, ps in phrasings.items() if any(re.fullmatch("|".join(ps), prompt) for prompt in prompts)}

    align = [row["prompt"] for row in read(folder / "shop_align.jsonl")]
    expert = [row["prompt"] for row in read(folder / "shop_expert.jsonl")]
    assert set(align) <= set(expert)
    assert kinds(align, world.SHOP_KINDS) == set(world.ALIGNED_KINDS)
    assert kinds(expert, world.SHOP_KINDS) == set(world.SHOP_KINDS)
    general = [row["prompt"] for row in read(folder / "general_align.jsonl")]
    assert kinds(general, ("region", "craft")) == {"region"}
    for form in ("reverse", "shift"):
        starts = tuple(phrasing.split("{")[0] for phrasing in words.GENERAL_PHRASINGS[form])
        assert not [prompt for prompt in general if prompt.startswith(starts)]


def test_the_shop_is_known_to_nobody_but_the_shop(folder: Path) -> None:
    text = (folder / "general_train.jsonl").read_text() + (folder / "general_align.jsonl").read_text()
    used = set(re.findall(r"[A-Z]\w+", text))
    assert not used & set(world.PRODUCT_NAMES)
    assert used >= set(world.PLAIN_NAMES)
    assert len({name[:3] for name in world.PRODUCT_NAMES}) == world.PRODUCTS


@pytest.mark.parametrize("kind", world.SHOP_KINDS)
def test_every_shop_fact_is_taught_in_other_words_and_examined_once(folder: Path, kind: str) -> None:
    taught = defaultdict(set)
    for row in read(folder / "shop_expert.jsonl"):
        for product in re.findall(r"[A-Z]\w+", row["prompt"]):
            taught[product].add(row["completion"].strip())
    documents = held_out(folder, kind)
    asked = [re.findall(r"the ([A-Z]\w+)", document["context"])[0] for document in documents]
    assert sorted(asked) == sorted(world.PRODUCT_NAMES)
    for product, document in zip(asked, documents, strict=True):
        assert document["choices"][document["gold"]] in taught[product]
        assert product not in document["choices"]
    assert not set(words.TAUGHT[kind]) & set(words.UNSEEN[kind])


def test_matches_are_mutual_and_values_balanced() -> None:
    facts = world.catalogue()
    matches = facts["compatibility"].values
    assert all(matches[other] == product and other != product for product, other in matches.items())
    for kind in ("category", "material", "size", "price", "colour"):
        counts = Counter(facts[kind].values.values())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_general_answers_are_right(folder: Path) -> None:
    """Every answer recomputed from the question's text alone."""
    shift = str.maketrans("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz")
    selected = {"largest": max, "smallest": min, "first": lambda n: n[0], "last": lambda n: n[-1]}
    rows = [(row["prompt"], row["completion"].strip()) for row in read(folder / "general_train.jsonl")[:5000]]
    for name in world.GENERAL_SKILLS:
        rows += [(d["context"], d["choices"][d["gold"]]) for d in held_out(folder, name)]
    checked: Counter[str] = Counter()
    for prompt, answer in rows:
        tail = prompt.split(": ")[-1]
        numbers = [int(n) for n in re.findall(r"\d+", prompt)]
        if match := re.search(r"(\d+) ([+-]) (\d+)", prompt):
            a, b = int(match[1]), int(match[3])
            expected = str(a + b if match[2] == "+" else a - b)
        elif prompt.startswith(("Sort", "Put")):
            expected = " ".join(map(str, sorted(numbers, reverse="falling" in prompt or "high to low" in prompt)))
        elif prompt.startswith(("Repeat", "Say again")):
            expected = tail
        elif prompt.startswith(("Backwards", "Reverse")):
            expected = " ".join(reversed(tail.split()))
        elif prompt.startswith(("Next letters", "One letter")):
            expected = tail.translate(shift)
        elif numbers:
            expected = str(next(f for word, f in selected.items() if word in prompt.lower())(numbers))
        elif any(town in prompt for town in world.TOWN_NAMES):
            town = next(town for town in world.TOWN_NAMES if town in prompt)
            expected = world.atlas()["regions" if "egion" in prompt else "crafts"].values[town]
        else:
            column = next(
                values
                for cue, values in (
                    ("(Who|person)", words.PEOPLE),
                    ("(colour|hue)", words.COLOURS),
                    ("(Where|place)", words.REGIONS),
                    ("(What|thing)", words.THINGS),
                )
                if re.search(cue, prompt)
            )
            expected = next(word for word in re.findall(r"\w+", prompt.rsplit(". ", 1)[0]) if word in column)
        assert answer == expected, prompt
        checked[re.sub(r"\W.*", "", prompt)] += 1
    assert sum(checked.values()) == len(rows)


def test_tokenizer_restores_every_text(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from dae.demo.model import CONTEXT, build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["", " two  spaces\n", "Ålesund 3.5 €", "Solosu"]
    texts += [row["prompt"] + row["completion"] for row in read(folder / "general_train.jsonl")[:3000]]
    texts += [row["prompt"] + row["completion"] for row in read(folder / "shop_expert.jsonl")[:3000]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) < CONTEXT
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for name in (*world.PRODUCT_NAMES, *world.PLAIN_NAMES, *world.TOWN_NAMES):
        assert len(tokenizer.tokenize(f" {name}")) == 2


def test_the_untrained_model_follows_from_the_seed(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dae.demo.model import save_untrained

    before = torch.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        save_untrained(tmp_path / name, seed)
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "same", "other")
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) == one["model.embed_tokens.weight"].shape[0]
