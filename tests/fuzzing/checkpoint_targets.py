"""Configs, indices, headers, adapters and tokenizers of checkpoints; run folders and caches of teachers."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from dae_eval.contamination import training_rows
from fuzzing.mutations import Choose, as_json, json_document, json_lines, mutated_bytes, text_document
from fuzzing.targets import Target, parts_of, together, workplace, written
from pico import make_checkpoint
from safetensors.torch import save
from worlds import make_adapter

from dae.recorded_rows import recorded_sources
from kd.cache.keys import FORMAT, TeacherKey
from kd.cache.parts import check_of
from kd.cache.store import TeacherStore
from kd.config.loading import resolved_yaml
from kd.models.adapter_features import refuse_changed_base, refuse_unknown_features, refuse_unshareable
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import check_safetensors, weight_files
from kd.models.compatibility import check_adapter
from kd.runs.checkpoints import checkpoint_fault
from kd.runs.provenance import base_fingerprint_of, base_quantization_of, read_provenance
from kd.runs.run_folder import RunFolder, Start
from kd.stages.sft_recipe import SftRecipe

HEX = "0" * 64


@functools.cache
def world() -> Path:
    """A base of each of two families, and an adapter."""
    folder = workplace() / "world"
    make_adapter(folder / "expert", make_checkpoint(folder / "llama"))
    make_checkpoint(folder / "gpt2", "gpt2")
    return folder


@functools.cache
def document(name: str) -> Any:
    return json.loads((world() / name).read_text())


def _fresh(name: str, *, like: str = "", without: tuple[str, ...] = ()) -> Path:
    folder = workplace() / name
    shutil.rmtree(folder, ignore_errors=True)
    if like:
        shutil.copytree(world() / like, folder, ignore=shutil.ignore_patterns(*without))
    else:
        folder.mkdir(parents=True)
    return folder


# -- files beside the weights ------------------------------------------------------------------------------------------


def _adapter_config(choose: Choose) -> bytes:
    return json_document([document("expert/adapter_config.json")], choose)


def _read_adapter_config(content: bytes) -> None:
    path = written("adapter/adapter_config.json", content)
    source = Checkpoint(str(path.parent), path.parent)
    refuse_changed_base(source)
    refuse_unknown_features(source)
    refuse_unshareable(source)
    assert source.base_path


def _put_adapter(content: bytes) -> None:
    folder = _fresh("put", like="expert", without=("adapter_config.json",))
    (folder / "adapter_config.json").write_bytes(content)
    base = Checkpoint(str(world() / "llama"), world() / "llama")
    check_adapter("expert", Checkpoint(str(folder), folder), base, shares=True)


def _index(choose: Choose) -> bytes:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    return json_document([{"metadata": {"total_size": 8}, "weight_map": dict(zip("ab", names, strict=True))}], choose)


def _read_index(content: bytes) -> None:
    written("shards/config.json", b"{}")
    for number in (1, 2):
        written(f"shards/model-0000{number}-of-00002.safetensors", b"")
    weight_files(written("shards/model.safetensors.index.json", content).parent)


def _tensors(choose: Choose) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}
    written_header = json_document([header], choose)
    length = len(written_header) if choose(6) else (10**18, 0, 1, 2**63, 10**8)[choose(5)]
    return struct.pack("<Q", length) + written_header + b"\0" * (4 if choose(6) else choose(9))


def _read_tensors(content: bytes) -> None:
    check_safetensors(written("one.safetensors", content))


def _config(choose: Choose) -> bytes:
    which = choose(2)
    return bytes([which]) + json_document([document(f"{('llama', 'gpt2')[which]}/config.json")], choose)


def _read_config(content: bytes) -> None:
    like = ("llama", "gpt2")[content[0] % 2] if content else "llama"
    folder = _fresh("config", like=like, without=("config.json", "tokenizer*"))
    (folder / "config.json").write_bytes(content[1:])
    Checkpoint(str(folder), folder).meta_model()


def _tokenizer(choose: Choose) -> bytes:
    files = [json_document([document(f"llama/{name}")], choose) for name in ("tokenizer.json", "tokenizer_config.json")]
    kept = [as_json(document("llama/tokenizer.json")), as_json(document("llama/tokenizer_config.json"))]
    which = choose(3)
    return together(files[0] if which else kept[0], files[1] if which != 1 else kept[1])


def _read_tokenizer(content: bytes) -> None:
    folder = _fresh("tokenizer", like="llama", without=("tokenizer*", "*.safetensors"))
    for name, part in parts_of(content, "tokenizer.json", "tokenizer_config.json").items():
        (folder / name).write_bytes(part)
    tokenizer = Checkpoint(str(folder), folder).tokenizer()
    tokenizer("one two", add_special_tokens=False)


# -- run folders -------------------------------------------------------------------------------------------------------

PROVENANCE = {
    "toolkit": "dae-align", "stage": "sft", "processes": 1, "base": {"path": "base", "fingerprint": HEX},
    "inputs": {"base": HEX}, "data": {"train": [{"path": "rows.jsonl", "sha256": HEX, "share": None, "encoded": HEX}]},
}  # fmt: skip
FINISHED = {"finished": True, "summary": {"loss": 1.0, "steps": 3}, "files": {"model.safetensors": HEX}}
METRICS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}]
MANIFEST = {"step": 3, "files": {"a.bin": {"bytes": 1, "sha256": HEX}}}
RUN_FILES = (
    "provenance.json", "run.json", "metrics.jsonl", "environment.json", "checkpoints/step-000003/manifest.json",
    "recipe.yaml",
)  # fmt: skip


@functools.cache
def _start() -> tuple[Start, str]:
    recipe = SftRecipe(base="base", output=str(workplace() / "run"), data={"train": [{"path": "rows.jsonl"}]})
    return Start("sft", recipe, {"base": HEX}, "base", {}), resolved_yaml(recipe)


def _run(choose: Choose) -> bytes:
    changed = choose(len(RUN_FILES))
    kept = [PROVENANCE, FINISHED, None, {"python": "3.11"}, MANIFEST, None]
    files = [json_document([one], choose) if number == changed else as_json(one) for number, one in enumerate(kept)]
    files[2] = json_lines(METRICS, choose) if changed == 2 else b"".join(as_json(one) + b"\n" for one in METRICS)
    files[5] = text_document([_start()[1]], choose) if changed == 5 else _start()[1].encode()
    return together(*files)


def _read_run(content: bytes) -> None:
    folder = _fresh("run")
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    for name, part in parts_of(content, *RUN_FILES).items():
        (folder / name).write_bytes(part)
    (folder / "checkpoints" / "step-000003" / "a.bin").write_bytes(b"a")
    run = RunFolder(folder)
    for act in (
        lambda: read_provenance(folder),
        lambda: (base_fingerprint_of(folder), base_quantization_of(folder)),
        lambda: checkpoint_fault(folder / "checkpoints" / "step-000003"),
        lambda: recorded_sources(str(folder), "domain"),
        lambda: training_rows([str(folder)]),
        run.metrics,
        run.summary,
        lambda: run.look(_start()[0]),
    ):
        _or_refused(act)


def _or_refused(act: Any) -> None:
    from kd.errors import UserError

    try:
        act()
    except UserError:
        return


# -- caches of teachers ------------------------------------------------------------------------------------------------


@functools.cache
def _parts() -> list[tuple[TeacherKey, bytes, bytes, bytes]]:
    """For each kind: its key, a part, the head, and teacher.json."""
    made = []
    for kind in ("hidden", "topk", "sampled"):
        key = TeacherKey(
            HEX, None, "float32", "float32", 2 if kind == "topk" else None, 2 if kind == "sampled" else None
        )
        answers = {
            "hidden": {"hidden": torch.zeros(3, 4)},
            "topk": {
                "ids": torch.zeros(3, 2, dtype=torch.int32),
                "log_q": torch.zeros(3, 2),
                "log_tail": torch.zeros(3),
            },
            "sampled": {"ids": torch.zeros(3, 2, dtype=torch.int32), "entropy": torch.zeros(3)},
        }[kind]
        rows = {"digests": torch.zeros(2, 32, dtype=torch.uint8), "offsets": torch.tensor([0, 1, 3])}
        rows["digests"][1] = 1
        cut = [{name: tensor[span] for name, tensor in answers.items()} for span in (slice(0, 1), slice(1, 3))]
        digests = [bytes(32), b"\1" * 32]
        rows["checks"] = torch.tensor([check_of(row, digest) for row, digest in zip(cut, digests, strict=True)])
        head = {"weight": torch.zeros(8, 4)}
        head["check"] = torch.tensor(check_of(head))
        owner = {"teacher": key.digest}
        facts = {"format": FORMAT, "teacher": "t", **vars(key), "vocabulary_rows": 8, "scale": 1.0, "softcap": None}
        made.append((key, save({**answers, **rows}, owner), save(head, owner), as_json(facts)))
    return made


def _cache(choose: Choose) -> bytes:
    kind = choose(3)
    _, part, head, facts = _parts()[kind]
    changed = choose(3)
    return bytes([kind]) + together(
        _other_tensors(part, choose) if changed == 0 else part,
        _other_tensors(head, choose) if changed == 1 else head,
        json_document([json.loads(facts)], choose) if changed == 2 else facts,
    )


def _other_tensors(file: bytes, choose: Choose) -> bytes:
    """A safetensors file with another header, or with other bytes."""
    if choose(2):
        return mutated_bytes(file, choose)
    length = struct.unpack("<Q", file[:8])[0]
    header = json_document([json.loads(file[8 : 8 + length])], choose)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]


def _read_cache(content: bytes) -> None:
    key = _parts()[content[0] % 3 if content else 0][0]
    folder = _fresh(key.digest)
    for name, part in parts_of(content[1:], "part-00000.safetensors", "head.safetensors", "teacher.json").items():
        (folder / name).write_bytes(part)
    store = TeacherStore(folder)
    teacher = store.teacher("t", key, "cpu")
    rows = [bytes(32), b"\1" * 32]
    if all(row in store for row in rows):
        assert store.answers(rows)
    assert teacher.kind == key.kind


TARGETS = [
    Target("adapter configs", _adapter_config, _read_adapter_config),
    Target("adapters on a base", _adapter_config, _put_adapter, slow=True),
    Target("indices of shards", _index, _read_index),
    Target("headers of tensors", _tensors, _read_tensors),
    Target("configs", _config, _read_config, slow=True),
    Target("tokenizers", _tokenizer, _read_tokenizer, slow=True),
    Target("run folders", _run, _read_run),
    Target("caches", _cache, _read_cache),
]
