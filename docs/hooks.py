"""mkdocs hooks: the site shows some files from outside docs/ as well, and tables of measured rows (benchmarks/show.py).

A link from a page in docs/ to `../CHANGELOG.md` works in the repository. In the site docs/ is the root, so the
hook removes one level from such links, and "docs/" from the links of the other files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.show import block  # noqa: E402

BLOCK = re.compile(r"```rows\n(.*?)```", re.DOTALL)
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "examples/*/README.md"]
OUTSIDE = [*PAGES, "benchmarks/*/*.json"]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    markdown = BLOCK.sub(lambda found: "\n".join(block(yaml.safe_load(found[1]))), markdown)
    up = "../" * page.file.src_uri.count("/")
    if page.file.generated_by is None:
        return markdown.replace(f"](../{up}", f"]({up}")
    return markdown.replace(f"]({up}docs/", f"]({up}")
