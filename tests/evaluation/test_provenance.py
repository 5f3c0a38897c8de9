"""The facts of rows of measurements."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from iosr_fast import __version__
from iosr_fast.evaluation import provenance


def test_the_commit_says_when_the_tree_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "core.hooksPath=/dev/null")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit(tmp_path) == f"version {__version__}"
    monkeypatch.setenv("IOSR_FAST_COMMIT", "0123456789ab")  # of a copy without its repository
    assert provenance.commit(tmp_path) == "0123456789ab"
    monkeypatch.delenv("IOSR_FAST_COMMIT")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD").strip()
    assert provenance.commit(tmp_path) == head[:12]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "rows.json").write_text("")
    assert provenance.commit(tmp_path) == head[:12], "rows are what a run writes"
    (tmp_path / "benchmarks" / "bench.py").write_text("")
    assert provenance.commit(tmp_path) == f"{head[:12]}+dirty"
    assert provenance.commit(tmp_path / "benchmarks") == f"version {__version__}", (
        "the repository is not the package's own"
    )
