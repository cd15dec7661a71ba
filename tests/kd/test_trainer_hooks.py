"""What the trainer overrides in transformers.Trainer: listed in one place, and as the installed release has it."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from kd.training import trainer
from kd.training.trainer import OVERRIDDEN, PRIVATE_ARGUMENTS, RoutedTrainer

FILES = [Path(trainer.__file__).with_name(f"{name}.py") for name in ("trainer", "callbacks", "progress", "settings")]
UPSTREAM = (Trainer, TrainingArguments, TrainerCallback, EarlyStoppingCallback)


def parameters(method: object) -> str:
    """A method's signature without annotations."""
    signature = inspect.signature(method)  # type: ignore[arg-type]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def private_names(source: str) -> Iterator[str]:
    """Names with one leading underscore that a module defines as methods or reads as attributes."""
    for node in ast.walk(ast.parse(source)):
        name = node.name if isinstance(node, ast.FunctionDef) else node.attr if isinstance(node, ast.Attribute) else ""
        if re.match(r"_[^_]", name):
            yield name


@functools.cache
def private_upstream() -> set[str]:
    """Private names of transformers' trainer, its arguments and its callbacks, those set on instances among them."""
    return {name for cls in UPSTREAM for name in private_names(inspect.getsource(cls))}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_have_the_recorded_signature(name: str) -> None:
    assert name in vars(RoutedTrainer), (
        f"kd.training.trainer.OVERRIDDEN lists {name}, which is not overridden: remove it"
    )
    method = getattr(Trainer, name, None)
    assert method is not None, (
        f"transformers {transformers.__version__} has no Trainer.{name}: RoutedTrainer.{name} is never called"
    )
    assert parameters(method) == OVERRIDDEN[name], (
        f"transformers {transformers.__version__} changed Trainer.{name}: adapt RoutedTrainer.{name}, then "
        "kd.training.trainer.OVERRIDDEN"
    )


def test_every_overridden_method_is_listed() -> None:
    overridden = {name for name in vars(RoutedTrainer) if inspect.isfunction(getattr(Trainer, name, None))}
    assert overridden - {"__init__"} == set(OVERRIDDEN)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_private_name_of_transformers_is_used(path: Path) -> None:
    used = set(private_names(path.read_text(encoding="utf-8"))) & private_upstream()
    assert used <= {*OVERRIDDEN, *PRIVATE_ARGUMENTS}


def test_attributes_that_are_set_on_transformers_classes_still_count(tmp_path: Path) -> None:
    assert hasattr(Trainer, "loss_is_scaled_for_ga")  # or the loss would be divided by the accumulation steps again
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 7
    assert arguments.n_gpu == 7


def test_the_check_sees_private_overrides() -> None:
    assert {"_save", "_n_gpu"} <= set(private_names("class A:\n def _save(self):\n  self.args._n_gpu = 1"))
    assert {"_save", "_n_gpu", "_train_batch_size"} <= private_upstream()
