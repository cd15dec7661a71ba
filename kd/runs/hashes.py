"""SHA-256 of files and of folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each named file below `folder`. Files are read side by side: hashing does not hold the interpreter."""
    ordered = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(ordered, pool.map(lambda name: file_sha256(folder / name), ordered), strict=True))


def joint_sha256(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over names and hashes: what `LC_ALL=C sha256sum NAMES... | sha256sum` prints for sorted names."""
    listing = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(listing.encode()).hexdigest()
