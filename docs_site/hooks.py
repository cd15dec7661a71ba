"""What mkdocs calls while it builds the site: generated parts of pages, files of the repository, and links to them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_site import keys, messages, rows

ROOT = Path(__file__).parents[1]
# Files outside docs/ that are on the site, at their place in the repository.
INCLUDED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "PAPERS.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.svg",
    "examples/*.py",
    "recipes/README.md",
    "recipes/**/*.yaml",
)
# `<!-- generated: NAME -->` on a line of its own in a page stands for what the function returns.
GENERATED: dict[str, Callable[[], str]] = {"keys": keys.section, "rows": rows.section, "messages": messages.section}
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\])\((?!\w+:|#)([^()\s#]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of INCLUDED."""
    for path in sorted(path for pattern in INCLUDED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Put the generated parts in, and turn links between files of the repository into links of the site."""
    uri = page.file.src_uri
    folder = PurePosixPath(repository_path(uri)).parent

    def of_site(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[1])
        there = "index.md" if target == "README.md" else target.removeprefix("docs/")
        if files.get_file_from_path(there) is None:
            # A file that is not on the site is named; one that does not exist stays, and mkdocs refuses it.
            return f" (`{target}`)" if (ROOT / target).exists() else link[0]
        return f"({os.path.relpath(there, PurePosixPath(uri).parent)}{link[2] or ''})"

    return MARKER.sub(lambda marker: GENERATED[marker[1]](), LINK.sub(of_site, markdown))


def repository_path(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return uri if any(PurePosixPath(uri).match(pattern) for pattern in INCLUDED) else f"docs/{uri}"
