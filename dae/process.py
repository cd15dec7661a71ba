"""Process-wide settings made before libraries are imported: threads, telemetry, warnings, logging."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dae.commands.stages import is_first_rank
from kd.config.problems import visible

# With any of these the user has chosen how long OpenMP threads spin.
SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
# Warnings of a kernel that no layer of ours would use, and of offloaded weights, which the run says itself.
NOT_SHOWN = ("bitsandbytes.backends.cpu.ops", "accelerate.big_modeling")


class _Visible(logging.Formatter):
    """Messages without control characters: they quote files, templates and servers of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def prepare_process(environment: Mapping[str, str]) -> None:
    """Set what libraries read when imported, here and in child processes; send our messages to stderr."""
    let_threads_sleep(environment)
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        if name not in environment:
            os.environ[name] = value
    ignore_warnings()
    for name in NOT_SHOWN:
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    for name in ("dae", "kd"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
        logger.propagate = False


def let_threads_sleep(environment: Mapping[str, str]) -> None:
    """Waiting OpenMP threads sleep, unless the user chose otherwise; without effect once torch is imported.

    On shared cores spinning costs several times the work (benchmarks/omp_wait_policy.py).
    """
    if not SPINNING & environment.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def ignore_warnings() -> None:
    """Filter what libraries warn each other's developers of."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|accelerate)\.")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Around a call from Python and its imports: libraries show errors alone, and no bar for each model they load."""
    let_threads_sleep(os.environ)
    with warnings.catch_warnings():
        ignore_warnings()
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in notebooks without ipywidgets
        levels = {logger: logger.level for logger in map(logging.getLogger, NOT_SHOWN)}
        for logger in levels:
            logger.setLevel(logging.ERROR)
        from transformers.utils import logging as transformers_logging

        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
