"""Calls to mergekit (LGPL-3.0, used as a library): quiet, on the CPU, with its exits turned into UserErrors."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kd.errors import UserError

logger = logging.getLogger("dae")


class _Kept(logging.Handler):
    """Collects what mergekit logs to the root logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "mergekit" in record.pathname:
            self.lines.append(record.getMessage())


@contextlib.contextmanager
def quiet(what: str) -> Iterator[None]:
    """Hide mergekit's output, pass on its warnings. Raises UserError if it exits."""
    kept, root = _Kept(), logging.getLogger()
    root.addHandler(kept)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
        if kept.lines:
            logger.warning("%s: mergekit warns: %s", what, " ".join(kept.lines))
    except SystemExit as end:
        raise UserError(f"{what}: mergekit failed: {' '.join(kept.lines) or 'no reason given'}") from end
    finally:
        root.removeHandler(kept)


def model(folder: Path) -> dict[str, Any]:
    """A local checkpoint for mergekit; as plain text, `+` and `@` would have another meaning."""
    return {"model": {"path": str(folder.resolve())}}


def merge(configuration: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write the weights of a mergekit merge configuration into `folder`.

    On the CPU, so that a seed gives the same result on every machine.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(device="cpu", quiet=True, write_model_card=False, copy_tokenizer=False)
    with torch.random.fork_rng(devices=[]), quiet(str(configuration["merge_method"])):
        torch.manual_seed(seed)
        run_merge(MergeConfiguration.model_validate(configuration), str(folder), options)


def mix(configuration: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write weights and config of a mergekit MoE configuration into `folder`.

    mergekit does not seed its random gate; this does. Gates from hidden states are computed in bfloat16.
    """
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    options = MergeOptions(device="cpu", quiet=True, write_model_card=False, copy_tokenizer=False)
    with torch.random.fork_rng(devices=[]), quiet("mixture"):
        torch.manual_seed(seed)
        build(MoEMergeConfig.model_validate(configuration), str(folder), options, device="cpu", allow_all_same=True)
