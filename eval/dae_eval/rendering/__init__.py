"""A report as terminal output, Markdown, JSON, HTML page and plots, all from the same dae_eval.report.Report."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dae_eval.report import Report
from kd.runs.files import TEMPORARY_PREFIX, disk_errors, fsync_path, fsync_tree, remove, write_text_durably

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dae_eval.rendering.plots import Plot

PAGE, MARKDOWN, JSON, PLOTS = "report.html", "report.md", "report.json", "plots"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, plots/*.svg and *.png, and last report.html into `folder`, over an older report.

    After a stop no file is half-written. Other files in the folder are kept.

    Raises:
        MachineError: the disk is full.
        UserError: the folder cannot be written.
    """
    from dae_eval.rendering import as_json, html, markdown, plots

    drawn = plots.draw(report)
    texts = {JSON: as_json.render(report), MARKDOWN: markdown.render(report), PAGE: html.render(report, drawn)}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_plots(drawn, folder / PLOTS)
    for name, text in texts.items():
        write_text_durably(folder / name, text)


def _write_plots(drawn: Sequence[Plot], place: Path) -> None:
    """Replace the folder of the plots; without plots, remove it."""
    new, old = (place.with_name(f"{TEMPORARY_PREFIX}{word}-{place.name}") for word in ("new", "old"))
    for leftover in (new, old):
        remove(leftover)
    try:
        new.mkdir()
        for plot in drawn:
            (new / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            (new / f"{plot.name}.png").write_bytes(plot.png)
        fsync_tree(new)
        if place.exists():
            os.replace(place, old)
        if drawn:
            os.replace(new, place)
    finally:
        for leftover in (new, old):
            with suppress(OSError):
                remove(leftover)
    fsync_path(place.parent)
