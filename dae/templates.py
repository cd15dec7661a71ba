"""Chat templates of the roles: a teacher prompted in another template than its own is off its training distribution."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dae.recipe import AlignRecipe
from kd.config.data_recipe import DataRecipe
from kd.data.chat import load_tokenizer
from kd.data.stage_data import StageData
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.stages.stage import Inputs

logger = logging.getLogger("dae")

EXPERT = "expert"  # a value of data.chat_template


def template_of_role(source: Checkpoint, trust_remote_code: bool) -> Any:
    """The chat template in a role's own folder: text, several by name, or None. Raises UserError."""
    if not source.has_tokenizer:
        return None
    return load_tokenizer(source, DataRecipe(), trust_remote_code).chat_template or None


def templates_of_roles(recipe: AlignRecipe, inputs: Inputs) -> dict[str, Any]:
    """Role -> its chat template, for experts and reference that have one. Raises UserError."""
    others = {role: one for role, one in inputs.items() if role.startswith("expert.")}
    if (reference := inputs.get("reference", inputs["base"])) is not inputs["base"]:
        others["reference"] = reference
    found = {role: template_of_role(one, recipe.trust_remote_code) for role, one in others.items()}
    return {role: template for role, template in found.items() if template is not None}


def chosen_template(recipe: AlignRecipe, templates: Mapping[str, Any]) -> Any:
    """The expert's chat template with `data.chat_template: expert`, else None. Raises UserError if it has none."""
    if recipe.data.chat_template != EXPERT:
        return None
    theirs = [templates.get(f"expert.{name}") for name in recipe.expert]
    without = [str(path) for path, template in zip(recipe.expert.values(), theirs, strict=True) if template is None]
    if without:
        raise UserError(
            f"data.chat_template: {EXPERT}: {without[0]} has no chat template; use `plain` or a .jinja file"
        )
    if len({sha256_of(template) for template in theirs}) > 1:
        raise UserError(f"data.chat_template: {EXPERT}: the experts have different chat templates; use a .jinja file")
    return theirs[0]


def sha256_of(template: Any) -> str:
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def remedy(recipe: AlignRecipe, templates: Mapping[str, Any]) -> str:
    """The remedy for conversations and a base without a chat template: a role's own, else `plain`."""
    if any(f"expert.{name}" in templates for name in recipe.expert):
        return f"set data.chat_template={EXPERT} to use the expert's"
    if "reference" in templates:
        file = Path(str(recipe.reference)) / "chat_template.jinja"
        return f"set data.chat_template={file} to use the reference's, or use another .jinja file"
    return "set data.chat_template to `plain` or to a .jinja file"


def warn_of_other_templates(recipe: AlignRecipe, templates: Mapping[str, Any], data: StageData) -> None:
    """Warn of each teacher whose template differs from the one that the rows were rendered with."""
    if not any(report.conversations for reports in data.reports.values() for report in reports):
        return
    ours = sha256_of(data.tokenizer.chat_template or "")
    for role, template in templates.items():
        if (theirs := sha256_of(template)) == ours:
            continue
        path = recipe.reference if role == "reference" else recipe.expert[role.removeprefix("expert.")]
        way = f"set data.chat_template={EXPERT} to use it" if role != "reference" else "check that this is intended"
        logger.warning(
            "%s %s: its chat template (SHA-256 %s) differs from the student's (%s), which is used; %s",
            *(role, path, theirs[:12], ours[:12], way),
        )
