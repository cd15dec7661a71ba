"""Recipes, suites, and `key=value` of the command line."""

from __future__ import annotations

from collections.abc import Mapping

from fuzzing.mutations import Choose, text_document
from fuzzing.targets import Target, workplace, written

from dae.commands.keys import schemas
from dae.pipeline.recipe import PipelineRecipe, read_pipeline
from kd.config.loading import load_recipe, resolved_yaml
from kd.config.schema import Frozen

SCHEMAS: dict[str, type[Frozen]] = {**schemas(), "run": PipelineRecipe}
NAMES = list(SCHEMAS)

RECIPES = {
    "align": """base: base
expert: expert
output: out
lambda: 0.5
data:
  general: [{path: a.jsonl, share: 0.9}]
  domain: [{path: b.jsonl, share: 0.1}]
  eval: {general: c.jsonl}
  max_length: 64
start: {domain: 0.3}
budget: {general: 0.02}
train: {max_steps: 3, learning_rate: 2e-5}
lora: {rank: 4, alpha: 8}
""",
    "sft": """base: base
output: out
data: {train: [a.jsonl, {path: b.csv, split: train}]}
lora: null
seed: 7
""",
    "distill": """base: base
teacher: {url: 'http://localhost:1/v1', model: m, top_k: 8}
output: out
data: {train: a.jsonl}
cache: {kind: topk, top_k: 4}
""",
    "suite": """shipped: world
metadata: {world: demo}
chat_template: false
groups:
  domain: [world_price, {task: world_size, shots: 0, limit: 10}]
  general: [mmlu]
  other: {kind: shown, tasks: [a]}
held_out: {general: [x.jsonl]}
""",
    "run": """output: out
stages:
  expert: {sft: {base: base, data: {train: a.jsonl}}}
  student:
    align: {base: base, expert: '@expert', data: {general: g.jsonl}}
""",
    "merge-weights": """base: base
expert: {a: x, b: y}
output: out
method: linear
""",
    "sample": """model: base
output: out.jsonl
rows: 10
temperature: 1.0
""",
    "rank-teachers": """a: &a [x, x]
b: &b [*a, *a]
c: &c [*b, *b]
d: [*c, *c]
base: &base {x: 1}
data: {<<: *base}
""",
}
ASSIGNMENTS = {
    "align": "base=base\nexpert=expert\ndata.general=a.jsonl\ndata.domain.0.path=b.jsonl\ndata.domain.0.share=0.2\n"
    "train.learning_rate=2e-5\nlora.rank=8\nstart.domain=0.3\nbudget.general=0.02\nseed=1",
    "sft": "base=base\ndata.train=[a.jsonl, b.jsonl]\nlora=null\ntrain.max_steps=3",
    "suite": "groups.general=[a]\nchat_template=true\nmetadata.x={a: [1, 2]}\nheld_out.general=x.jsonl",
    "distill": "base=base\ndata.train=a.jsonl\nteacher.url=http://localhost/v1\nteacher.model=m\ncache.kind=topk",
}


def _input(seeds: Mapping[str, str], choose: Choose) -> bytes:
    """A schema's number, and a text; mostly one that is meant for it."""
    name = list(seeds)[choose(len(seeds))]
    return bytes([NAMES.index(name) if choose(8) else choose(len(NAMES))]) + text_document([seeds[name]], choose)


def _schema(content: bytes) -> type[Frozen]:
    return SCHEMAS[NAMES[content[0] % len(NAMES) if content else 0]]


def _recipe(choose: Choose) -> bytes:
    return _input(RECIPES, choose)


def _read_recipe(content: bytes) -> None:
    recipe = load_recipe(_schema(content), written("recipe.yaml", content[1:]), {})
    path = written("again.yaml", resolved_yaml(recipe).encode())
    assert load_recipe(_schema(content), path, {}) == recipe


PIPELINE = """output: out
stages:
  general: {stage: sample, model: base, rows: 10}
  expert: &expert {stage: sft, base: base, data: {train: a.jsonl}}
  student: {stage: align, base: base, expert: "@expert", data: {general: "@general"}}
"""


def _pipeline(choose: Choose) -> bytes:
    return text_document([PIPELINE], choose)


def _read_pipeline(content: bytes) -> None:
    read_pipeline(written("pipeline.yaml", content)).pipeline()


def _assignments(choose: Choose) -> bytes:
    return _input(ASSIGNMENTS, choose)


def _read_assignments(content: bytes) -> None:
    lines = content[1:].decode("utf-8", "replace").split("\n")
    flags = {} if _schema(content) is SCHEMAS["suite"] else {"output": str(workplace() / "out")}
    load_recipe(_schema(content), None, flags, lines)


TARGETS = [
    Target("recipes", _recipe, _read_recipe),
    Target("pipelines", _pipeline, _read_pipeline),
    Target("key=value", _assignments, _read_assignments),
]
