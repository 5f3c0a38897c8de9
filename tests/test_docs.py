"""What the pages in docs/ name exists: tests, files, and the site's menu."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import iosr_fast
from tests import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_every_guarantee_names_tests_that_exist() -> None:
    _, table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n| guarantee | test |\n")
    rows = table.split("\n\n")[0].splitlines()[1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]*test_\w+\.py)`", row.split("|")[2])
        assert named, row
        assert [path for path in named if not (ROOT / path).is_file()] == [], row


def test_every_photograph_has_an_author_and_a_licence() -> None:
    folder = ROOT / "docs/photographs"
    text = (folder / "LICENCE.txt").read_text(encoding="utf-8")
    for path in [*folder.glob("*.jpg"), *folder.glob("*.webp")]:
        entry = re.search(rf"^{path.name} .*(?:\n .*)*", text, re.MULTILINE)
        assert entry and re.search(r"CC0|CC BY|public domain", entry[0]) and "From " in entry[0], path.name
        assert path.stat().st_size < 150_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in code marks that begin with a folder of the repository."""
    text = page.read_text(encoding="utf-8")
    folders = "iosr_fast|kernels|csrc|tools|tests|benchmarks|docs"
    for path in re.findall(rf"[`\s]((?:{folders})/[\w./*-]+\.\w+)", text):
        assert list(ROOT.glob(path)), f"{page.name}: {path}"


def test_the_page_of_commands_lists_all_of_them() -> None:
    from iosr_fast.cli import COMMANDS

    listed = re.findall(r"^\| `iosr-fast ([\w-]+)` \|", (ROOT / "docs/commands.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(name for names in COMMANDS.values() for name in names)


def test_the_api_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text("utf-8")
    for name in set(iosr_fast.__all__) - {"__version__"}:
        assert f"\n::: iosr_fast.{name}\n" in text or name == "IosrFastError", name
    assert "\n::: iosr_fast.exceptions\n" in text


def test_the_list_of_rooms_is_that_of_the_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\nkernels/")[0]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    for room in (room for layer in contract["layers"] for room in layer.split(" | ")):
        assert re.search(rf"\b{room}(/|\.py)", text), room


def test_prose_stays_within_100_columns() -> None:
    """Tables, code and links may be wider."""
    for page in PAGES:
        code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            wide = code or "http" in line or line.startswith("|")
            assert wide or len(line) <= 100, f"{page.name}:{number}"
