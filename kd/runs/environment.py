"""What a run ran on, without anything that should stay private."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "dae-align", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors",
    "huggingface_hub", "numpy", "mergekit", "bitsandbytes",
)  # fmt: skip

# next-token is what this field calls a loss, and so a fair name for a model.
_SECRET_KEY = re.compile(
    r"(?<!next[-_])token$|secret|password|passwd|credential|api[-_]?key|access[-_]?key", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"\b(hf_\w{8,}|sk-[\w-]{8,}|gh[pousr]_\w{8,}|AKIA\w{12,})")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def library_versions() -> dict[str, str]:
    """Version of each installed library that bears on a run's numbers."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Python, platform, libraries, torch's threads and devices, the toolkit's commit, the masked command line.

    Environment variables, user and host name are left out: run folders get published.
    """
    return {
        "command": masked(typed() if command is None else command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "libraries": library_versions(),
        "torch": _torch_facts(),
        "commit": toolkit_commit(),
    }


def typed() -> list[str]:
    """The command line; of a notebook's kernel only that it is one: the rest names a file of the user's."""
    return ["ipykernel"] if "ipykernel" in Path(sys.argv[0]).name else sys.argv


def _torch_facts() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cuda": torch.version.cuda,
        "devices": devices or ["cpu"],
    }


def masked(command: Sequence[str]) -> list[str]:
    """The command line with the values of secret-looking keys, known token formats and logins in URLs as `***`."""
    shown, mask_next = [], False
    for argument in command:
        key, equals, _ = argument.partition("=")
        secret = bool(_SECRET_KEY.search(key))
        if mask_next and not argument.startswith("-"):
            shown.append("***")
            mask_next = False
            continue
        if secret and equals:
            shown.append(f"{key}=***")
        else:
            shown.append(_URL_LOGIN.sub("***", _SECRET_VALUE.sub("***", argument)))
        mask_next = secret and not equals and argument.startswith("-")
    return shown


def toolkit_commit() -> str | None:
    """Git commit of the toolkit (with `-dirty` for changed files), only where it runs from its own checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    # An installed copy inside somebody else's repository must not report that repository's commit.
    if not (root / ".git").exists():
        return None
    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments in a way that can change a run's last bits, one line for each."""
    lines = []
    for group in ("libraries", "torch"):
        old, new = before.get(group) or {}, now.get(group) or {}
        lines += [
            f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)
        ]
    lines += [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in ("python", "machine")
        if before.get(key) != now.get(key)
    ]
    return lines
