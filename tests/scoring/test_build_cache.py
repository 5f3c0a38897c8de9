"""A cached build is one of the very same sources, flags and versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scoring import build_cache


def test_a_changed_source_or_fact_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "ROOT", tmp_path)
    monkeypatch.setattr(build_cache, "CACHES", tmp_path / "cache")
    source = tmp_path / "source" / "a.cpp"
    source.parent.mkdir()
    builds: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "binary").write_text(source.read_text())

    def built(*facts: str) -> str:
        return (build_cache.build_once("name", [source.parent], facts, build) / "binary").read_text()

    for text in ("first", "second"):
        source.write_text(text)
        assert [built("-O1"), built("-O1"), built("-O2"), built("-O", "1")] == [text] * 4
    assert len(builds) == 6


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "CACHES", tmp_path / "cache")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("the compiler was interrupted")

    for _ in range(2):
        with pytest.raises(OSError, match="interrupted"):
            build_cache.build_once("name", [], [], fail)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
