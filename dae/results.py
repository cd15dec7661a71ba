"""What a training call from Python gives back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dae.stages import STAGES
from kd.config.loading import load_recipe
from kd.config.stage_recipe import StageRecipe
from kd.runs.provenance import HELD_OUT, read_provenance

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dae.reporting import ReportResult

NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}  # as metrics.jsonl spells them


@dataclass(frozen=True)
class TrainingResult(os.PathLike[str]):
    """A finished run. It is a path, too: pass it where a model is wanted.

    Attributes:
        path: the run folder.
        summary: steps, loss and KL by route, as in run.json.
    """

    path: Path
    summary: Mapping[str, Any] = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        routes = [name for name in self.summary["rows"] if not name.startswith(HELD_OUT)]
        last = self.summary["last"]
        figures = (f"{key} {last[key]:.3g}" for name in routes for key in (f"{name}/kl", f"{name}/ntp") if key in last)
        return f"TrainingResult({', '.join([str(self.path), str(self.summary['steps']) + ' steps', *figures])})"

    @property
    def recipe(self) -> StageRecipe:
        """The recipe, with every default; rows in memory are represented by their number and SHA-256."""
        provenance = read_provenance(self.path)
        assert provenance is not None
        return load_recipe(STAGES[provenance["stage"]].recipe, self.path / "recipe.yaml", {})

    @property
    def metrics(self) -> DataFrame:
        """metrics.jsonl as a table: a row for each logged step, a column for each metric, NaN where none was logged."""
        from pandas import DataFrame

        from kd.runs.run_folder import RunFolder

        lines = [
            {key: NUMBERS.get(str(value), value) for key, value in line.items() if not isinstance(value, Mapping)}
            for line in RunFolder(self.path).metrics()
        ]
        return DataFrame(lines).groupby("step").first()

    def model(self) -> PreTrainedModel | PeftModel:
        """The trained model in eval mode, on the accelerator if there is one: an adapter on its base, or full weights.

        Raises:
            UserError: the base is not found, or a checkpoint is not complete.
        """
        from dae.process import quiet_libraries

        recipe = self.recipe
        with quiet_libraries():
            from kd.models.checkpoint import checkpoint
            from kd.models.roles import load_model
            from kd.training.settings import load_settings

            if recipe.lora is None:
                return load_model(checkpoint(str(self.path)), load_settings(recipe))
            from peft import PeftModel

            base = load_model(checkpoint(recipe.base), load_settings(recipe))
            adapted: PeftModel = PeftModel.from_pretrained(base, str(self.path))
            return adapted.eval()

    def report(
        self, suite: str | os.PathLike[str], *, output_dir: str | os.PathLike[str] | None = None, **options: Any
    ) -> ReportResult:
        """Judge this run's model as the student; base, expert and reference are those of its recipe.

        Args:
            suite: a YAML file of lm-eval tasks in groups.
            output_dir: by default `report` in the run folder.
            **options: arguments of `dae.report`, over those of the recipe. An expert is needed where the recipe has
                none or several, unless with `retention_only=True`.

        Raises:
            UserError: models, suite or bounds are wrong.
            MachineError: disk or memory is full.
        """
        from dae.reporting import report

        roles = {**roles_of(self.recipe), "student": str(self.path), **options}
        return report(suite=suite, output_dir=self.path / "report" if output_dir is None else output_dir, **roles)


def roles_of(recipe: StageRecipe) -> dict[str, str]:
    """Base, expert and reference of a recipe as a report wants them, where they are checkpoints."""
    experts = getattr(recipe, "expert", {})
    given = {"base": recipe.base, "reference": getattr(recipe, "reference", None)}
    given |= {"expert": next(iter(experts.values()))} if len(experts) == 1 else {}
    return {role: one for role, one in given.items() if isinstance(one, str)}
