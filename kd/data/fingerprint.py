"""Which rows: the SHA-256 by which a run knows its data again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kd.config.in_memory_rows import InMemoryRows
from kd.data.records import FILE_ENDINGS, HUB_ID, refuse_recorded_in_memory
from kd.errors import UserError
from kd.runs.files import file_sha256, files_sha256, joint_sha256


def data_sha256(path: str | Path | InMemoryRows) -> str:
    """Fingerprint of rows: SHA-256 of a file's bytes, joint hash of the files of a folder that `datasets` saved, or
    SHA-256 of a hub data set's name and commit, or the one that rows in memory have.

    Raises:
        UserError: there is no such file, folder or hub data set.
    """
    if isinstance(path, InMemoryRows):
        return path.sha256
    place = Path(path)
    if place.is_file():
        return file_sha256(place)
    if not place.is_dir():
        return _hub_data_sha256(str(path))
    # `datasets` leaves cache-*.arrow files in a folder that is merely read.
    names = [
        file.relative_to(place).as_posix()
        for file in place.rglob("*")
        if file.is_file() and not file.name.startswith(("cache-", "."))
    ]
    return joint_sha256(files_sha256(place, names))


def _hub_data_sha256(name: str) -> str:
    refuse_recorded_in_memory(name)
    missing = f"{name}: no such file or folder"
    if not HUB_ID.fullmatch(name) or name.endswith(FILE_ENDINGS):
        raise UserError(missing)
    from datasets import load_dataset_builder

    try:
        commit = load_dataset_builder(name).hash  # offline this is the commit of what lies in the cache
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{missing}, and no hub data set: {error}") from error
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
