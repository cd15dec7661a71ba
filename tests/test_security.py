"""SECURITY.md: every line of its lists has a test here. A changed line fails until its test is read again."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from chat_tokenizers import KINDS, with_template
from dae_eval.folders import documents_name, read_documents, read_evaluation, write_evaluation
from dae_eval.judging.asking import LENGTH, Reply
from dae_eval.judging.readings import rating_of, verdict_of
from dae_eval.rendering import html, markdown, plots
from dae_eval.rendering.card import write_card
from evaluations import models
from lm_eval.tasks import TaskManager
from markdown_it import MarkdownIt
from pico import make_checkpoint
from reports import HOSTILE, hostile_report
from worlds import make_adapter

from dae.cli import command_line, run
from dae.commands.keys import schemas
from dae.pipeline.recipe import read_pipeline
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.config.problems import visible
from kd.config.schema import Frozen
from kd.data.chat import UnrenderableError, render
from kd.data.records import LONGEST_LINE, read_jsonl
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import weight_files
from kd.models.compatibility import check_complete
from kd.runs.checkpoints import checkpoint_fault
from kd.runs.claimed_folder import ClaimedFolder
from kd.runs.environment import masked
from kd.runs.files import read_json
from kd.served.connection import Connection, EndpointChoice, Wording, plain_url
from kd.stages.sft_recipe import SftRecipe

ROOT = Path(__file__).parents[1]
CODE = [path for package in ("kd", "dae", "eval") for path in sorted((ROOT / package).rglob("*.py"))]
TESTS: dict[str, Callable[..., None]] = {}
KEY = "sk-1234567890abcdef"
ASK = [{"role": "user", "content": "?"}]


def proves(line: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Ties a test to the line of SECURITY.md that it proves."""

    def tie(test: Callable[..., None]) -> Callable[..., None]:
        assert line not in TESTS
        TESTS[line] = test
        return test

    return tie


def lines_of_the_document() -> list[str]:
    """The items of its lists, but for what is not covered, each in one line."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Not covered")[0]
    items = re.findall(r"^- (.*(?:\n  .*)*)", text, re.MULTILINE)
    return [" ".join(item.split()) for item in items]


def test_every_line_has_its_test_and_every_test_its_line() -> None:
    assert lines_of_the_document() == list(TESTS)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_adapter(folder / "adapter", make_checkpoint(folder / "base"))
    return folder


@pytest.fixture
def base(origin: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, with a module that writes a file where it is imported."""
    folder = shutil.copytree(origin / "base", tmp_path / "base")
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'was run')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        # Classes of its own: transformers marks those that it has read as remote code.
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): pass\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    return folder


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), folder)


def refused(act: Callable[[], object], words: str = ".") -> str:
    """The message that `act` ends with; words: a pattern that it matches."""
    with pytest.raises(UserError, match=words) as caught:
        act()
    return str(caught.value)


def trees() -> list[tuple[Path, ast.AST]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in CODE]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of a function or method of this name, in all of the toolkit's code."""
    found = [(path, node) for path, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(path, node) for path, node in found if ast.unparse(node.func).split(".")[-1] == name]


# -- code --------------------------------------------------------------------------------------------------------------


@proves("A recipe is plain YAML: tags of Python objects are refused.")
def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: !!python/object/apply:os.system ['touch {tmp_path}/was-run']\n")
    every: list[type[Frozen]] = list(schemas().values())
    for schema in every:
        refused(lambda schema=schema: load_recipe(schema, path, {}), "could not determine a constructor")
        refused(lambda schema=schema: load_recipe(schema, None, {}, ["base=!!python/name:os.system"]), "cannot be read")
    refused(lambda: read_pipeline(path))
    assert not (tmp_path / "was-run").exists()


@proves("Code that comes with a checkpoint (`auto_map`) is run with `trust_remote_code: true` only.")
def test_remote_code(base: Path, tmp_path: Path) -> None:
    change(base / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    opened(base).meta_model()
    opened(base).tokenizer()
    change(base / "config.json", model_type="of its own")
    refused(lambda: opened(base).meta_model(), "custom code")
    assert not (tmp_path / "was run").exists()
    opened(base).tokenizer(trust_remote_code=True)
    assert (tmp_path / "was run").exists()


@proves(
    "An attention on the hub (`OWNER/NAME`) is code, too, and is refused without `trust_remote_code: true`, in recipes "
    "and in checkpoints."
)
def test_kernels(base: Path) -> None:
    flags = {"base": "b", "output": "o", "data.train": "t", "attn_implementation": "owner/name"}
    refused(lambda: load_recipe(SftRecipe, None, flags), "attn_implementation = 'owner/name': is code on the hub")
    assert load_recipe(SftRecipe, None, {**flags, "trust_remote_code": True}).attn_implementation == "owner/name"
    for key in ("attn_implementation", "_attn_implementation"):
        change(base / "config.json", **{key: {"": "owner/name"}})
        refused(lambda: opened(base).meta_model(), f"{key}: .*: is code on the hub")
        change(base / "config.json", **{key: None})


@proves(
    "A folder of lm-eval tasks (`include` in a suite) is code: its `!function` is run, so read a stranger's folder "
    "before you name it."
)
def test_task_folders(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'was run')!r}, 'w').close()\ndef docs(*_, **__): return {{}}\n"
    )
    (tmp_path / "task.yaml").write_text(
        "task: t\ncustom_dataset: !function evil.docs\ntest_split: test\noutput_type: generate_until\ndoc_to_text: x\n"
        "doc_to_target: y\n"
    )
    with suppress(Exception):  # it has no documents
        TaskManager(include_path=str(tmp_path), include_defaults=False).load(["t"])
    assert (tmp_path / "was run").exists()


# -- weights -----------------------------------------------------------------------------------------------------------


@proves("Models are read from safetensors files; a checkpoint with pickled weights only is refused.")
def test_safetensors_only(base: Path, origin: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert weight_files(base) == ["config.json", "model.safetensors"]
    (base / "model.safetensors").unlink()
    refused(lambda: weight_files(base), "a pickle can run any code")
    opens = [ast.unparse(node) for _, node in calls("from_pretrained") if "AutoModel" in ast.unparse(node.func)]
    assert len(opens) >= 2
    assert all("use_safetensors=True" in text for text in opens)


@proves(
    "Optimizer state is read from a run's own checkpoints, if their files have the SHA-256 of the manifest, with "
    "`weights_only=True`."
)
def test_optimizer_state(tmp_path: Path) -> None:
    loads = [node for _, node in calls("load") if ast.unparse(node.func) == "torch.load"]
    assert len(loads) >= 2
    for node in loads:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["weights_only"] == "True"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/was-run",)

    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1, "files": {"optimizer.pt": {"sha256": "0" * 64}}}))
    assert "torn or altered" in str(checkpoint_fault(tmp_path))


@proves("Nothing else is unpickled.")
def test_no_pickles() -> None:
    readers = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path, tree in trees():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & readers, path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path


@proves("A checkpoint's index may name only safetensors files beside it.")
@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd.safetensors", "../x.safetensors", "a.bin", 7, "a" * 300]
)
def test_indices(base: Path, name: Any) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: weight_files(base), "is no safetensors file beside it")


@proves("Numbers in a config allocate nothing before the files are compared with them.")
def test_huge_numbers(origin: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file, settings in {
        "config.json": [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "head_dim",
            "num_labels",
        ],
        "tokenizer_config.json": ["extra_ids", "offset"],
    }.items():
        for key in settings:
            folder = shutil.copytree(origin / "base", tmp_path / key)
            change(folder / file, **{key: 10**12})
            read = (
                opened(folder).tokenizer if file.startswith("tokenizer") else lambda f=folder: check_complete(opened(f))
            )
            assert str(folder) in refused(read)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# -- text --------------------------------------------------------------------------------------------------------------


@proves("Chat templates run in Jinja's immutable sandbox and reach nothing outside of it.")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.clear() }}",
    ],
)
def test_sandbox(template: str) -> None:
    with pytest.raises(UnrenderableError, match=r"unsafe|not safely callable"):
        render(with_template(KINDS["byte-level"], template), template, ASK)


@proves(
    "The work of one rendering is limited: a template that never ends, or whose text grows without end, is one message."
)
@pytest.mark.parametrize("body", ["", "{% set n.s = n.s ~ n.s %}", "{% for j in range(99999) %}{% endfor %}"])
def test_limited_work(body: str) -> None:
    loops = "{% for i in range(99999) %}" * (1 if body else 2)
    template = "{% set n = namespace(s='ab') %}" + loops + body + "{% endfor %}" * loops.count("range")
    refused(
        lambda: render(with_template(KINDS["byte-level"], template), template, ASK), "does too much in one rendering"
    )


@proves("JSON that is nested too deeply is one message.")
def test_deep_json(base: Path, tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for name in ("rows.jsonl", "own.json", "adapter_config.json", "provenance.json"):
        (tmp_path / name).write_text(f'{{"a": {deep}}}')
    (base / "config.json").write_text(f'{{"a": {deep}}}')
    refused(lambda: list(read_jsonl(str(tmp_path / "rows.jsonl"))), "nested too deeply")
    refused(lambda: read_json(tmp_path / "own.json"), "cannot be read")
    refused(lambda: opened(tmp_path).adapter_config, "is no JSON")
    refused(lambda: opened(tmp_path).fingerprint, "is not valid JSON")
    refused(lambda: opened(base).meta_model(), "is no JSON")


@proves("YAML whose aliases unfold to more than 100,000 values is one message.")
def test_aliases(tmp_path: Path) -> None:
    names = "abcdefghijklmnopqrstuvwxyz"
    laughs = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in itertools.pairwise(names)
    )
    merged = "a: &a {x: 1}\n" + "".join(
        f"{name}: &{name} {{<<: [*{before}, *{before}]}}\n" for before, name in itertools.pairwise(names)
    )
    path = tmp_path / "recipe.yaml"
    for text in (laughs, merged):
        path.write_text(text)
        refused(lambda: load_recipe(AlignRecipe, path, {}), "aliases unfold to more than 100000 values")
    refused(lambda: load_recipe(AlignRecipe, None, {}, ["base=&a [*a, *a]"]))


@proves("A packed file that unpacks without end is one message.")
def test_packed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dae_eval.folders.MOST_UNPACKED", 1 << 26)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range((LONGEST_LINE >> 24) + 1):
            file.write(bytes(1 << 24))
    refused(lambda: list(read_jsonl(str(tmp_path / "rows.jsonl.gz"))), "a line holds one row")
    refused(lambda: read_documents(tmp_path / "rows.jsonl.gz"), "unpack to more than")


@proves("The command line writes control characters in text of strangers as `<U+001B>`.")
def test_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text('base: "\\e]0;title\\a\\e[2J"\n"\\e[31m": 1\n')
    assert run(["sft", "--recipe", str(tmp_path / "r.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "U+001B" in shown or "x1b" in shown
    assert "\x1b" not in shown and "\x07" not in shown
    assert visible("\x1b]0;t\x07\x9b\u202e\ttab\nline") == "<U+001B>]0;t<U+0007><U+009B><U+202E>\ttab\nline"


@proves("A judge's reply of any form gives a rating, a verdict, or a reason why it gives none.")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[[" * 10**5,
        "<think>" * 10**4,
        "[[9" + "9" * 5000 + "]]",
        "\x00\ud83d[[7]]",
        "[[" + "9" * 10**5,
        "<|channel|>" + "a" * 10**5,
        "[[A]][[B]]",
        "[[1e9]]",
    ],
)
def test_judges(text: str) -> None:
    for stop in ("stop", LENGTH, "content_filter"):
        for strictly in (True, False):
            rating, why = rating_of(Reply(text, stop), strictly)
            assert rating >= 0 or why
            winner, why = verdict_of(Reply(text, stop), "model_1", "model_2", strictly)
            assert winner != "error" or why


# -- paths -------------------------------------------------------------------------------------------------------------


@proves("Names of routes, experts and stages have letters, digits, `-` and `_`: none leads out of the output folder.")
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "a\\b", "x\0y"])
def test_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = {"base": "b", "output": "o", "expert": {"a": "x"}, "data": {"general": "g", "a": "d"}}
    for changed in ({"expert": {name: "x"}}, {"data": {"general": "g", "a": "d", name: "e"}}):
        path.write_text(json.dumps({**whole, **changed}))
        refused(lambda: load_recipe(AlignRecipe, path, {}))
    stage = {"stage": "sft", "base": "b", "data": {"train": "x"}}
    path.write_text(json.dumps({"output": "o", "stages": {name: stage}}))
    refused(lambda: read_pipeline(path).pipeline(), "invalid name")
    path.write_text(json.dumps({"output": "o", "stages": {"fine": stage}}))
    assert read_pipeline(path).pipeline().stages[0].output == Path("o/fine")


@proves("Names of tasks become file names without separators.")
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/b\\c", "\0", "x\n"])
def test_tasks(name: str) -> None:
    assert re.fullmatch(r"documents/[A-Za-z0-9_.-]+-k\.jsonl\.gz", documents_name(name, "k"))


@proves("An evaluation's documents are read from its own folder.")
def test_documents(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "own", models()["student"])
    file = tmp_path / "own" / "evaluation.json"
    facts = json.loads(file.read_text())
    for other in (f"../own/{facts['tasks'][0]['file']}", str(tmp_path / "own" / facts["tasks"][0]["file"])):
        change(file, tasks=[{**facts["tasks"][0], "file": other}])
        refused(lambda: read_evaluation(tmp_path / "own"), "lies outside of documents/")


@proves("A symbolic link in a run's checkpoint is refused, and clearing up after a kill follows none.")
def test_links(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for place in (outside, folder):
        place.mkdir()
    (outside / "mine").write_text("")
    (folder / "a.bin").symlink_to(outside / "mine")
    (folder / "manifest.json").write_text(json.dumps({"files": {"a.bin": {"sha256": "0"}}}))
    assert checkpoint_fault(folder) == "a.bin is no plain file"
    (folder / ".tmp-x").symlink_to(outside)
    ClaimedFolder(folder, "manifest.json").sweep()
    assert not (folder / ".tmp-x").is_symlink()
    assert (outside / "mine").exists()


# -- keys --------------------------------------------------------------------------------------------------------------


@proves("Keys of servers are read from environment variables: no flag and no recipe key takes one.")
def test_keys() -> None:
    def commands(command: Any) -> list[Any]:
        return [command, *(one for inner in getattr(command, "commands", {}).values() for one in commands(inner))]

    every = commands(typer.main.get_command(command_line()))
    flags = {name for command in every for parameter in command.params for name in parameter.opts}
    secret = re.compile(r"api.?key|token$|secret|password", re.IGNORECASE)
    assert len(flags) > 50
    assert not {flag for flag in flags if secret.search(flag)}
    flags_of_sft = {"base": "b", "output": "o", "data.train": "t"}
    for key in ("api_key", "train.hub_token", "train.push_to_hub_token"):
        refused(lambda key=key: load_recipe(SftRecipe, None, flags_of_sft, [f"{key}={KEY}"]))
    assert "api_key" not in str(load_recipe(SftRecipe, None, flags_of_sft))


@proves("A key is sent to its own server, and is cut out of what that server says.")
def test_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_KEY", KEY)
    wording = Wording("w", "k", "s")
    ours = Connection(EndpointChoice("http://localhost:1/v1", "m", "--url", "ONE_KEY"), wording)
    other = Connection(EndpointChoice("http://localhost:2/v1", "m", "--url", "OTHER_KEY"), wording)
    assert ours.client.api_key == KEY
    assert other.client.api_key != KEY
    assert KEY not in ours.clean(ValueError(f"wrong key {KEY}")) + str(ours.described(ValueError(KEY)))
    assert ours.without_key(f"a {KEY} b") == "a *** b"


@proves("Logins in addresses are refused, and secrets in a recorded command line are masked.")
def test_addresses() -> None:
    for url in (f"http://user:{KEY}@localhost/v1", f"http://localhost/v1?key={KEY}", f"http://localhost/v1#{KEY}"):
        assert KEY not in refused(lambda url=url: plain_url(EndpointChoice(url, "m", "--url", "K")))
    typed = ["dae", f"api_key={KEY}", "--token", KEY, f"http://u:{KEY}@h/", f"x={KEY}"]
    assert KEY not in str(masked(typed))


# -- reports -----------------------------------------------------------------------------------------------------------


@proves("All text in the HTML page is escaped, and its content security policy allows one script, which is ours.")
def test_page() -> None:
    report = hostile_report()
    text = html.render(report, plots.draw(report))
    assert "<script>window.hacked" not in text and "<img src=x" not in text and "<b>group" not in text
    assert text.count("<script") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1] and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}';", policy[1])
    assert any(word in text for word in HOSTILE[2].split()[:1])


@proves("Text in the Markdown report and in the model card is escaped: it makes no link and no HTML.")
def test_markdown(tmp_path: Path) -> None:
    report = hostile_report()
    write_card(report, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    for text in (markdown.render(report), card):
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
        assert not kinds & {"link_open", "image", "html_inline", "code_inline"}
        blocks = [token.content for token in tokens if token.type == "html_block"]
        assert all(block.startswith("<!-- dae report") for block in blocks)


@proves("No CSV is written, so no cell is read as a formula.")
def test_no_csv() -> None:
    for name in ("writer", "DictWriter", "to_csv", "writerow"):
        assert not calls(name)
