"""Every code block of the README and of the pages in docs/ runs, so that none is ever untrue."""

from __future__ import annotations

import re
import sys
from contextlib import chdir, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import ROOT
from tests.docs.documents import Document, find_command
from tests.docs.place import users_place

DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture
def fiftyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for FiftyOne's zoo, with the options that a page gives it."""

    def load(name: str, split: str, label_types: Any, classes: list[str], max_samples: int, dataset_name: str) -> Any:
        return SimpleNamespace(values=lambda field: [f"{classes[0]}.jpg"])

    zoo = SimpleNamespace(load_zoo_dataset=load)
    monkeypatch.setitem(sys.modules, "fiftyone", SimpleNamespace(zoo=zoo))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fiftyone.zoo", zoo)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("fiftyone")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_block_of_a_page_runs(path: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """In order, in one folder: a block uses what those before it have made. A failure names its line, others go on."""
    with users_place(tmp_path) as folder, closing(Document(path, folder)) as document:
        for block in document.blocks:
            with subtests.test(line=block.line):
                document.run(block)


PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_names_commands_options_and_targets_that_exist(path: Path) -> None:
    """Between code marks in the text; a command may be without what it needs, so it is not parsed whole."""
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"`iosr-fast ([^`]+)`", text):
        command, _ = find_command([word for word in line.split() if not word.isupper()])
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        options = {word.partition("=")[0] for word in line.split() if word.startswith("--")}
        assert options <= known | {"--help"}, f"{line}: {options - known}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)", text)) <= targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_names_clips_that_can_be_downloaded(path: Path) -> None:
    import open_clip

    text = path.read_text(encoding="utf-8")
    named = re.findall(r"--model (\S+)\s+(?:\\\s+)?--pretrained ([\w.-]+)", text)
    named += re.findall(r'"(ViT-[\w-]+)",\s*(?:"?pretrained"?[=:]\s*)?"([\w.-]+)"', text)
    assert [pair for pair in named if pair not in open_clip.list_pretrained()] == []


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```rust\na: 1\n```", "expected python or one of"),
        ("```yaml\na: [\n```", "expected the node content"),
        ("```yaml\nexpr: iosr_fast_nothing_total > 1\n```", "got iosr_fast_nothing"),
        ("```ini\n[Service]\nExecStart=iosr-fast serve x --copies 2\n```", "No such option: --copies"),
        ("```python\nassert 1 == 2, 'unequal'\n```", "unequal"),
        ("```sh\nfalse\n```", "false"),
        ("```sh\npip install '.[nothing]'\n```", "expected extras of"),
        ("```sh\niosr-fast serve-ray my-classifier --copies 2\n```", "No such option: --copies"),
        ("```python\n", "1 fences, but"),
    ],
)
def test_an_untrue_block_fails(block: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n{block}\n")
    with pytest.raises(Exception, match=re.escape(message)), chdir(tmp_path):
        document = Document(tmp_path / "page.md", tmp_path)
        document.run(document.blocks[0])
