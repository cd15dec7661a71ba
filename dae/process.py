"""Process-wide settings made before libraries are imported: threads, telemetry, warnings, logging."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping

from dae.commands.stages import is_first_rank
from kd.config.problems import visible

# With any of these the user has chosen how long OpenMP threads spin.
SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


class _Visible(logging.Formatter):
    """Messages without control characters: they quote files, templates and servers of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def prepare_process(environment: Mapping[str, str]) -> None:
    """Set what libraries read when imported, here and in child processes; send our messages to stderr.

    Waiting OpenMP threads sleep, unless the user chose otherwise: on shared cores spinning costs several times the work
    (benchmarks/omp_wait_policy.py).
    """
    if not SPINNING & environment.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        if name not in environment:
            os.environ[name] = value
    warnings.filterwarnings("ignore", category=FutureWarning)
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|accelerate)\.")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    for name in ("dae", "kd"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
        logger.propagate = False
