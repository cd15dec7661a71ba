"""What is settled before libraries are imported: threads, telemetry, warnings, where our messages go."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping

from dae.commands.stages import is_first_rank

# Any of these is the user's choice of how long OpenMP's threads spin.
SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def prepare_process(environment: Mapping[str, str]) -> None:
    """Settle what libraries read when they are imported, here and in child processes; send our messages to stderr.

    Threads of OpenMP sleep while they wait, unless the user chose: on cores that others use too, spinning ones cost
    several times the work (benchmarks/omp_wait_policy.py).
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
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("dae", "kd"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
        logger.propagate = False
