"""Fuzzing of everything that is read from outside, coverage-guided where atheris is installed.

    PYTHONPATH=.:eval:tests python benchmarks/fuzz.py --seconds 1200

goes on from what was recorded: results/fuzz.json gets a line for each target and run, results/fuzz.md the sums. Corpora
and inputs that were neither read nor refused are kept in --work. Targets are in tests/fuzzing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LONGEST_INPUT = 256  # bytes of choices, not of the input that is made of them
STARTS = 64  # inputs that a corpus begins with
INSTRUMENTED = ("kd", "dae", "dae_eval", "yaml", "jinja2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200, help="of all targets together")
    parser.add_argument("--targets", nargs="*", default=[], help="names; all unless given")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fuzz", help="folder for corpora and findings")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        fuzz_one(arguments.one, arguments.seed, arguments.seconds, arguments.work.resolve())
        return
    from fuzzing.targets import targets

    names = arguments.targets or [target.name for target in targets()]
    for name in names:
        record(run_one(name, arguments.seconds / len(names), arguments.work.resolve()))
    write_table()


def run_one(name: str, seconds: float, work: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own: a crash of the interpreter is a finding, too."""
    seed = 1 + sum(one["target"] == name for one in recorded())
    state = work / "state.json"
    work.mkdir(parents=True, exist_ok=True)
    state.unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--seed",
        str(seed),
        "--seconds",
        str(seconds),
        "--work",
        str(work),
    ]
    began = time.monotonic()
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(state.read_text()) if state.is_file() else {"inputs": 0, "findings": []}
    if ended.returncode != 0:
        found["findings"].append(f"the process ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")
    line = {"date": datetime.now(UTC).date().isoformat(), "target": name, "seed": seed}
    line |= {"seconds": round(time.monotonic() - began), **found}
    print(json.dumps(line), flush=True)
    return line


def fuzz_one(name: str, seed: int, seconds: float, work: Path) -> None:
    """One target in this process."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    warnings.filterwarnings("ignore")
    try:
        import atheris
    except ImportError:
        session = Session(name, "random", work)
        choose, end = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            session.try_one(choose.randrange)
        session.save()
        return
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        session = Session(name, "atheris", work)

    def one_input(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        session.try_one(lambda below: provider.ConsumeIntInRange(0, below - 1))

    corpus = work / "corpus" / name.replace(" ", "-").replace("'", "").replace("=", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    begin = random.Random(seed)
    for _ in range(STARTS):
        start = begin.randbytes(LONGEST_INPUT)
        (corpus / hashlib.sha1(start).hexdigest()).write_bytes(start)
    settings = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={LONGEST_INPUT}", "-len_control=0"]
    settings += ["-timeout=120", "-rss_limit_mb=4096", f"-artifact_prefix={work}/crash-", "-verbosity=0"]
    import atexit

    atexit.register(session.save)
    atheris.Setup(["fuzz", *settings, str(corpus)], one_input)
    atheris.Fuzz()


class Session:
    """Counts of one target, saved every second."""

    def __init__(self, name: str, engine: str, work: Path) -> None:
        from fuzzing.targets import targets, warm_up

        self._target = next(target for target in targets() if target.name == name)
        warm_up(self._target)
        self._engine, self._work = engine, work
        self._outcomes: Counter[str] = Counter()
        self._findings: dict[str, str] = {}
        self._saved = time.monotonic()

    def try_one(self, choose: Any) -> None:
        from fuzzing.targets import try_input

        content = self._target.make(choose)
        outcome, finding = try_input(self._target, content)
        self._outcomes[outcome] += 1
        if finding is not None and finding.what not in self._findings:
            self._findings[finding.what] = finding.trace
            place = self._work / "findings" / hashlib.sha1(f"{finding.target}{finding.what}".encode()).hexdigest()[:12]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".input").write_bytes(content)
            place.with_suffix(".txt").write_text(f"{finding.target}: {finding.what}\n{finding.trace}")
        if time.monotonic() - self._saved > 1:
            self.save()

    def save(self) -> None:
        self._saved = time.monotonic()
        counts = {"inputs": self._outcomes.total(), **dict(self._outcomes)}
        state = {"engine": self._engine, **counts, "findings": sorted(self._findings)}
        temporary = self._work / "state.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self._work / "state.json")


def recorded() -> list[dict[str, Any]]:
    path = RESULTS / "fuzz.json"
    return json.loads(path.read_text()) if path.is_file() else []


def record(line: dict[str, Any]) -> None:
    lines = [*recorded(), line]
    (RESULTS / "fuzz.json").write_text("[\n" + ",\n".join(json.dumps(one) for one in lines) + "\n]\n")


KEYS = ("inputs", "read", "refused", "findings", "fixed", "seconds")


def write_table() -> None:
    lines = recorded()
    sums: dict[str, Counter[str]] = {}
    for line in lines:
        counts = {**{key: line.get(key, 0) for key in KEYS}, "findings": len(line["findings"])}
        counts["fixed"] = len(line.get("fixed", []))  # written by hand
        sums.setdefault(line["target"], Counter()).update(counts)
    sums["all"] = sum(sums.values(), Counter[str]())
    rows = [f"| {name} | {' | '.join(f'{counts[key]:,}' for key in KEYS)} |" for name, counts in sums.items()]
    engines = ", ".join(sorted({line.get("engine", "none") for line in lines}))
    dates = " to ".join(dict.fromkeys((min(line["date"] for line in lines), max(line["date"] for line in lines))))
    (RESULTS / "fuzz.md").write_text(
        f"# Fuzzing\n\n{dates}, by {engines}. An input is read, or refused with one message; a traceback, a crash, or "
        "more than ten\nseconds is a finding. Each line of [fuzz.json](fuzz.json) is one run of one target, with its "
        f"seed.\n\n| target | {' | '.join(KEYS)} |\n|---|{'---:|' * len(KEYS)}\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
