"""Which rows: the SHA-256 by which a run knows its data again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kd.config.in_memory_rows import InMemoryRows
from kd.data.hub import could_be_on_the_hub, hub_dataset_commit
from kd.data.records import refuse_recorded_in_memory
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
    if not could_be_on_the_hub(name):
        raise UserError(f"{name}: no such file or folder")
    return hashlib.sha256(f"{name}@{hub_dataset_commit(name)}".encode()).hexdigest()
