"""Training data that a recipe omits, taken from the run folders of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dae.routing import GENERAL, UNNAMED
from kd.config.in_memory_rows import recorded_in_memory
from kd.config.layering import parse_file
from kd.data.fingerprint import data_sha256
from kd.errors import UserError
from kd.runs.provenance import read_provenance


def domain_remedy(name: str, path: Any) -> str:
    """What to add if an expert's rows are unknown, and why its run folder does not have them."""
    flag = "--domain-data PATH" if name == UNNAMED else f"--domain-data {name}=PATH"
    return f"add {flag}{why_unknown(path, name)}"


def general_remedy(raw: Mapping[str, Any]) -> str:
    path = raw.get("reference") or raw.get("base")
    return f"add --general-data PATH (`dae sample` writes such rows){why_unknown(path, GENERAL)}"


def why_unknown(path: Any, route: str) -> str:
    """Why no rows are recorded in the run folder at `path`, as the end of a sentence."""
    if not isinstance(path, str) or not path:
        return ""
    found = recorded_sources(path, route)
    return f"; {found}" if isinstance(found, str) else ""


def complete_from_run_folders(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in rows that a recipe omits from the run folders of its checkpoints.

    An expert's rows are those that it was trained on; general rows are those of the reference (or the base). A file is
    used only if its content is unchanged. Settings of single sources, such as `data.domain.0.share=0.2`, override them.
    """
    experts, data = raw.get("expert"), raw.get("data")
    if not isinstance(experts, Mapping) or not isinstance(data, Mapping):
        return raw
    routes = dict(data["routes"])
    for name, path in {**experts, GENERAL: raw.get("reference") or raw.get("base")}.items():
        settings = settings_by_place(routes.get(name, ()))
        if not isinstance(path, str) or settings is None:
            continue
        routes.pop(name, None)
        found = recorded_sources(path, name)
        if not isinstance(found, str):
            routes[name] = with_settings(found, settings, name, path)
    return {**raw, "data": {**data, "routes": routes}}


def settings_by_place(route: Any) -> Mapping[str, Any] | None:
    """{"0": {"share": 0.2}} if a route has only such settings; None if it names rows.

    `data.domain.0.share=0.2` without a `data.domain` gives this, read as a single source.
    """
    if not isinstance(route, Sequence) or len(route) > 1:
        return None
    written = route[0] if route else {}
    return written if isinstance(written, Mapping) and all(str(place).isdigit() for place in written) else None


def with_settings(
    sources: Sequence[Mapping[str, Any]], settings: Mapping[Any, Any], route: str, folder: str
) -> list[dict[str, Any]]:
    """Sources with settings that override theirs, by place. Raises UserError for an unknown place."""
    found = [dict(source) for source in sources]
    for place, values in settings.items():
        if int(place) >= len(found):
            last = f"0 to {len(found) - 1}" if len(found) > 1 else "0"
            raise UserError(f"data.{route}.{place}: no such source in the data recorded in {folder}; expected {last}")
        found[int(place)] |= values
    return found


def recorded_sources(folder: str, route: str) -> list[dict[str, Any]] | str:
    """The recorded sources of a run folder: of its route of this name, else of `train`.

    Returns:
        The sources, without shares (those belong to that run); or, as text, why there are none.
    """
    if folder.startswith(("http://", "https://")):  # it may hold a login
        return "no data is recorded at the address of a server"
    provenance = read_provenance(folder)
    if provenance is None:
        what = "is not a run folder of dae" if Path(folder).is_dir() else "is no folder on this machine"
        return f"{folder} {what}, so no data is recorded in it"
    data = provenance.get("data", {})
    name = route if route in data else "train"
    if name not in data:
        return f"{folder} was not trained on rows for this route"
    settings = recorded_settings(Path(folder) / "recipe.yaml", name)
    sources = []
    for place, source in enumerate(data[name]):
        if recorded_in_memory(source["path"]):
            told = f"{folder} was trained on rows {source['path']}, which no run folder keeps"
            return f'{told}; in Python, pass train_dataset={{"{route}": ROWS}}'
        try:
            unchanged = data_sha256(source["path"]) == source["sha256"]
        except UserError:
            from_here = "" if Path(source["path"]).is_absolute() else " from the current folder"
            return f"{folder} was trained on {source['path']}, which is not found{from_here}"
        if not unchanged:
            return f"{folder} was trained on {source['path']}, which has changed since"
        sources.append({"path": source["path"], **(settings[place] if place < len(settings) else {"split": "train"})})
    return sources


def recorded_settings(recipe: Path, route: str) -> list[dict[str, Any]]:
    """Split and format of each source of a route, from a run folder's resolved recipe."""
    if not recipe.is_file():
        return []
    data = parse_file(recipe)[1].get("data")
    sources = data.get(route) if isinstance(data, Mapping) else None
    named = [source if isinstance(source, Mapping) else {} for source in sources or ()]
    return [{key: source[key] for key in ("split", "format") if source.get(key) is not None} for source in named]
