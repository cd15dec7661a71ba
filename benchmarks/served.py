"""A teacher on a server beside the same teacher on this machine: what is stored, and what it does to a run.

    D=runs/demo_seeds/seed-0; T=runs/served/teacher
    dae merge weights --method linear --base $D/base --expert $D/expert --output $T weight=1.0
    vllm serve $T --served-model-name shop --dtype float32 --max-model-len 64 --port 8711
    python benchmarks/served.py --url http://127.0.0.1:8711/v1 --model shop

From the repository's root; needs a demo (`dae demo --output runs/demo_seeds/seed-0`). Two runs of `dae align` differ in
where the expert is: here with `cache.kind=topk`, or on the server. Every stored probability and every step's loss are
compared; with other rows or steps nothing is written.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.starts_tables import table

RESULTS = Path("benchmarks/results")
DEMO = Path("runs/demo_seeds/seed-0")
TEACHER = Path("runs/served/teacher")
NOTES = """\
Both runs have the same rows and tokens in the same steps. Stored values are natural logarithms; `tail` is the
probability of all tokens but the {top_k} largest, here exactly, from a server as what is left of 1.
"""


def expert_keys(place: str, url: str, model: str, top_k: int) -> list[str]:
    if place == "here":
        return [f"expert.shop={TEACHER}"]
    return [f"expert.shop.url={url}", f"expert.shop.model={model}", f"expert.shop.top_k={top_k}"]


def run(place: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fills a cache, then trains. Seconds to fill, what is stored of the expert, and the losses."""
    keys = [f"data.shop.path={DEMO}/world/shop_align.jsonl", "data.shop.share=0.7"]
    keys += [f"data.general.path={DEMO}/world/general_align.jsonl", "data.general.share=0.3"]
    keys += ["data.max_length=64", "start=base", "train.learning_rate=1e-3", "train.per_device_train_batch_size=32"]
    keys += ["train.logging_steps=1", f"train.max_steps={arguments.steps}"]
    keys += [f"cache.path={folder / f'cache-{place}'}", "cache.kind=topk", f"cache.top_k={arguments.top_k}"]
    keys += expert_keys(place, arguments.url, arguments.model, arguments.top_k)
    common = ["align", "--base", str(DEMO / "base"), "--output", str(folder / place), *keys]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dae", "cache", *common], check=True, stdout=subprocess.DEVNULL)
    filled = time.perf_counter() - began
    subprocess.run([sys.executable, "-m", "dae", *common], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": filled,
        "stored": stored_answers(folder / f"cache-{place}"),
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def stored_answers(cache: Path) -> dict[bytes, dict[str, Any]]:
    """Of the expert, by the digest of a row: ids (T, k), their log-probabilities (T, k), the tail's (T)."""
    from safetensors.torch import load_file

    rows: dict[bytes, dict[str, Any]] = {}
    for about in sorted(cache.glob("*/teacher.json")):
        if json.loads(about.read_text(encoding="utf-8"))["teacher"].endswith("/base"):
            continue
        for part in sorted(about.parent.glob("part-*")):
            tensors = load_file(part)
            bounds = tensors["offsets"].tolist()
            for index, digest in enumerate(tensors["digests"]):
                span = slice(bounds[index], bounds[index + 1])
                kept = {name: tensors[name][span] for name in ("ids", "log_q", "log_tail")}
                rows[digest.numpy().tobytes()] = kept
    return rows


def compared(here: Mapping[str, Any], server: Mapping[str, Any]) -> dict[str, Any]:
    """The largest differences. Raises ValueError where rows, positions or steps are not the same."""
    rows = [(kept, server["stored"].get(digest)) for digest, kept in here["stored"].items()]
    if any(of is None or of["ids"].shape != kept["ids"].shape for kept, of in rows) or not rows:
        raise ValueError("the two caches do not hold the same rows")
    if len(rows) != len(server["stored"]) or len(here["losses"]) != len(server["losses"]):
        raise ValueError("the two runs do not have the same rows or steps")
    import torch

    same_N = torch.cat([(kept["ids"] == of["ids"]).all(-1) for kept, of in rows])
    largest = {}
    for name in ("log_q", "log_tail"):
        alike = torch.cat([(kept[name] - of[name]).abs() for kept, of in rows])[same_N]
        largest[name] = float(alike.max()) if alike.numel() else 0.0
    pairs = list(zip(here["losses"], server["losses"], strict=True))
    return {
        "rows": len(rows),
        "positions": len(same_N),
        "positions_with_other_tokens": int((~same_N).sum()),
        **largest,
        "steps": len(pairs),
        "loss": max(abs(one - other) for one, other in pairs),
        "largest_loss": max(one for one, _ in pairs),
        "seconds": {"here": here["seconds"], "server": server["seconds"]},
    }


def server_version(url: str) -> str:
    """What the server calls itself; empty where it does not say."""
    address = url.rstrip("/").removesuffix("/v1") + "/version"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return ""


def markdown(record: Mapping[str, Any]) -> str:
    found = record["found"]
    rows = [
        ["rows, response tokens", f"{found['rows']:,}, {found['positions']:,}"],
        [f"positions whose {record['top_k']} largest tokens differ", f"{found['positions_with_other_tokens']}"],
        ["log-probability of a token, largest difference", f"{found['log_q']:.1e}"],
        ["log-probability of the tail, largest difference", f"{found['log_tail']:.1e}"],
        [
            f"loss of {found['steps']} steps (up to {found['largest_loss']:.2f}), largest difference",
            f"{found['loss']:.1e}",
        ],
        [
            "seconds of `dae cache`, here and from the server",
            f"{found['seconds']['here']:.0f}, {found['seconds']['server']:.0f}",
        ],
    ]
    server = f"{record['server']} {record['version']}".strip()
    head = f"# A teacher on a server\n\n{record['date']}, CPU, {server}. Written by `benchmarks/served.py`.\n"
    return f"{head}\n{table(['what', 'value'], rows)}\n\n{NOTES.format(top_k=record['top_k'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the server, with /v1")
    parser.add_argument("--model", required=True, help="the served checkpoint's name there")
    parser.add_argument("--server", default="vLLM", help="what the server is, for the page")
    parser.add_argument("--top-k", type=int, default=20, help="at most the server's --max-logprobs")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = compared(*(run(place, Path(name), arguments) for place in ("here", "server")))
    record = {
        "date": dt.date.today().isoformat(),
        "server": arguments.server,
        "version": server_version(arguments.url),
        "top_k": arguments.top_k,
        "found": found,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "served.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "served.md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
