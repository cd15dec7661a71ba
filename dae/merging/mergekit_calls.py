"""mergekit (LGPL-3.0, a library here) behind one door: quiet, on the CPU, its way of giving up turned into messages."""

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
    """Keeps what mergekit logs, which would else go to the root logger's stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "mergekit" in record.pathname:
            self.lines.append(record.getMessage())


@contextlib.contextmanager
def quiet(what: str) -> Iterator[None]:
    """No progress bars of mergekit's; what it warns of is passed on. Raises UserError where it ends the process."""
    kept, root = _Kept(), logging.getLogger()
    root.addHandler(kept)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
        if kept.lines:
            logger.warning("%s: mergekit says: %s", what, " ".join(kept.lines))
    except SystemExit as end:
        raise UserError(f"{what}: mergekit refuses it: {' '.join(kept.lines) or 'it does not say why'}") from end
    finally:
        root.removeHandler(kept)


def model(folder: Path) -> dict[str, Any]:
    """A local checkpoint in mergekit's terms; in plain text `+` and `@` would be read as something else."""
    return {"model": {"path": str(folder.resolve())}}


def merge(configuration: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write the weights that a merge configuration of mergekit's describes into `folder`.

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
    """Write the mixture of experts that a MoE configuration of mergekit's describes into `folder`: weights and config.

    mergekit does not seed its random gate; this does. Gates from hidden states are computed in bfloat16.
    """
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    options = MergeOptions(device="cpu", quiet=True, write_model_card=False, copy_tokenizer=False)
    with torch.random.fork_rng(devices=[]), quiet("mixture"):
        torch.manual_seed(seed)
        build(MoEMergeConfig.model_validate(configuration), str(folder), options, device="cpu", allow_all_same=True)
