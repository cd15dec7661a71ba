"""Pictures of a finished report for the README: what the terminal shows at 80 columns, and the top of the page.

    python benchmarks/pictures.py REPORT_FOLDER NAME [--docs docs]

writes NAME-terminal.svg and NAME-page.png. The second needs Chromium at /usr/bin/chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tempfile
from pathlib import Path

from dae_eval.rendering.terminal import show
from dae_eval.report import Report
from pydantic import TypeAdapter
from rich.console import Console

CHROMIUM = "/usr/bin/chromium"
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars")  # fmt: skip


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("name")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--height", type=int, default=1500, help="of the page's picture, in pixels")
    arguments = parser.parse_args()
    terminal(arguments.report / "report.json", arguments.docs / f"{arguments.name}-terminal.svg")
    page(arguments.report / "report.html", arguments.docs / f"{arguments.name}-page.png", arguments.height)


def terminal(report: Path, picture: Path) -> None:
    """The report as `dae report` prints it, 80 columns wide."""
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    show(TypeAdapter(Report).validate_json(report.read_bytes()), console)
    # A fixed id: else every run writes another file. Rich names fonts to be fetched from elsewhere; any will do.
    drawn = console.export_svg(title="dae report", unique_id=picture.stem)
    picture.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL), encoding="utf-8")


def page(report: Path, picture: Path, height: int) -> None:
    """The page from its top, 1100 pixels wide."""
    with tempfile.TemporaryDirectory() as profile:
        target = [f"--user-data-dir={profile}", f"--window-size=1100,{height}", f"--screenshot={picture.resolve()}"]
        command = [CHROMIUM, *QUIET, *target, report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
