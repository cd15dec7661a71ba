"""Data sets on the hub, through `datasets` and its cache."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kd.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".arrow")
SECONDS = 10  # for one answer of the hub


def could_be_on_the_hub(name: str) -> bool:
    """Whether a path that is not there has the form owner/name and does not end as a file of rows does."""
    if not HUB_ID.fullmatch(name) or name.endswith(FILE_ENDINGS):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_dataset(name: str, split: str) -> Any:
    """The rows of a data set's split. Raises UserError where neither hub nor cache has them."""
    import datasets

    with asking_the_hub_once(name, f" (split {split!r})"):
        return datasets.load_dataset(name, split=split)


def hub_dataset_commit(name: str) -> str | None:
    """The commit of a data set: the hub's newest, or without a network that of what lies in the cache.

    Raises:
        UserError: neither hub nor cache has it.
    """
    import datasets

    with asking_the_hub_once(name):
        commit: str | None = datasets.load_dataset_builder(name).hash
        return commit


@contextmanager
def asking_the_hub_once(name: str, which: str = "") -> Iterator[None]:
    """Turn errors of the block into UserError. Where the hub does not answer one request, only the cache is read.

    `datasets` alone tries for half a minute and prints each try, which is long for a path with a typo.
    """
    from datasets import config

    before = config.HF_HUB_OFFLINE
    silent = None if before else why_no_answer(name)
    config.HF_HUB_OFFLINE = before or silent is not None
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"the hub does not answer ({silent}), and the cache does not have it" if silent else error
        raise UserError(
            f"{name}: no such file or folder, nor can it be read as a hub data set{which}: {reason}"
        ) from error
    finally:
        config.HF_HUB_OFFLINE = before


@functools.cache
def why_no_answer(name: str) -> str | None:
    """What keeps the hub from answering; None where it answers, also that it has no such data set.

    Asked once in a process, so that rows and their fingerprint come from the same place.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=SECONDS, expand=["sha"])
    except HfHubHTTPError:
        return None
    except Exception as error:  # noqa: BLE001 - the hub client lets errors of its HTTP library through
        return str(error).strip() or type(error).__name__
    return None
