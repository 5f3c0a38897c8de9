"""docs/gallery.md: the script writes the page and its pictures, and the page in the repository is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.demo_cache import demo_bundle

DOCS = ROOT / "docs"
ROWS = ROOT / "benchmarks" / "results" / "accuracy-demo.json"
DATA = ROOT / "iosr_fast" / "clip" / "demo" / "data"
SUFFIXES = (".png", ".webp")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.fixture
def built(demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's engine is there; what follows holds no lock, because it takes long."""
    demo_bundle()
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))


def local_links(page: str) -> set[str]:
    return {link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link}


def check_pictures(docs: Path, page: str) -> None:
    """Every picture is one, has an alt text, and is on the page; every licence beside them is the data's."""
    shown = re.findall(r"!\[([^\]]+)\]\((gallery/[^)]+)\)", page)
    assert {link for _, link in shown} == {
        f"gallery/{path.name}" for path in (docs / "gallery").iterdir() if path.suffix in SUFFIXES
    }
    assert len(shown) == 4 and all(len(alt) > 40 for alt, _ in shown)
    for _, link in shown:
        with Image.open(docs / link) as image:
            assert image.width > 900 and len(image.convert("L").getcolors()) > 20
    licences = {path.name: path.read_bytes() for path in (docs / "gallery").glob("LICENSE-*")}
    assert licences == {path.name: path.read_bytes() for path in DATA.glob("LICENSE-*")}
    assert {f"gallery/{name}" for name in licences} <= local_links(page)


def rows_below(page: str, heading: str) -> dict[str, list[str]]:
    """The first table below a heading: the cells of each line by its first cell."""
    lines = [line for line in page.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.slow
def test_a_trial_writes_the_page_and_all_pictures(built: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tools.gallery import make_gallery

    for name in ("first", "again"):
        make_gallery(tmp_path / name, concepts=12)
    page = (tmp_path / "first" / "gallery.md").read_text()
    check_pictures(tmp_path / "first", page)
    overlap = rows_below(page, "Overlap before and after the adapter")
    assert 0 < float(overlap["adapted"][0]) < 1 and 0.5 < float(overlap["adapted"][1]) <= 1
    assert "of 12 concepts" in page and "12 classes from 4 pictures" in page
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_rows_of_one_seed_have_no_spread_to_draw(tmp_path: Path) -> None:
    from tools.gallery import read_accuracy
    from tools.reporting.load import BrokenResults

    rows = [row for row in json.loads(ROWS.read_text()) if row["bench"] == "accuracy"]
    (tmp_path / "one.json").write_text(json.dumps([{**rows[0], "std": None}]))
    with pytest.raises(BrokenResults, match=r"one\.json: expected rows of accuracy over at least two seeds"):
        read_accuracy(tmp_path / "one.json")


def test_the_page_in_the_repository_has_its_pictures_and_links() -> None:
    page = (DOCS / "gallery.md").read_text()
    check_pictures(DOCS, page)
    assert [link for link in local_links(page) if not (DOCS / link).is_file()] == []
    pictures = [DOCS / link for link in local_links(page) if link.endswith(SUFFIXES)]
    assert DOCS / "page.png" in pictures and sum(path.stat().st_size for path in pictures) < 600_000


def test_the_numbers_on_the_page_are_the_measured_rows() -> None:
    page = (DOCS / "gallery.md").read_text()
    rows = json.loads(ROWS.read_text())
    table = rows_below(page, "Accuracy by shots and method")
    assert table.pop("method") == ["1 picture", "2 pictures", "4 pictures"] and table.pop("---")
    measured: dict[str, list[str]] = {}
    for row in rows:
        if row["bench"] == "accuracy" and row["reducer"] in ("none", "auto"):
            measured.setdefault(row["method"], []).append(f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f}")
    assert table == measured
    overlap = rows_below(page, "Overlap before and after the adapter")
    for row in rows:
        if row["bench"] == "overlap" and row["embeddings"] in overlap:
            shown = [float(cell) for cell in overlap.pop(row["embeddings"])]
            assert shown == pytest.approx([row["overlap_area"], row["auroc"]], abs=0.0015)
    assert set(overlap) == {"embeddings", "---"}


@pytest.mark.slow
def test_the_page_in_the_repository_is_what_the_script_makes(built: None, tmp_path: Path) -> None:
    """Word for word; numbers may differ in the last digit between machines."""
    pytest.importorskip("matplotlib")
    from tools.gallery import make_gallery

    make_gallery(tmp_path)
    made, committed = ((folder / "gallery.md").read_text() for folder in (tmp_path, DOCS))
    assert NUMBER.sub("#", made) == NUMBER.sub("#", committed)
    for ours, theirs in zip(NUMBER.findall(made), NUMBER.findall(committed), strict=True):
        a, b = (float(number.replace(",", "")) for number in (ours, theirs))
        assert a == pytest.approx(b, rel=0.01, abs=1.0 if "." not in ours else 0.002)
