"""Two trees beside each other: each side runs its own benchmark in turns, and a slower tree is an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import compare as module
from iosr_fast.exceptions import IosrFastError

FAKE = """
import json, sys
out = sys.argv[sys.argv.index("--json") + 1]
rows = [
    {{"case": "few", "impl": "ours", "runtime_ms": {time}, "ratios": {{"rival": 2.0}}}},
    {{"case": "few", "impl": "rival", "runtime_ms": {time}, "ratios": {{}}}},
    {{"case": {own!r}, "impl": "ours", "runtime_ms": {time}, "ratios": {{}}}},
]
open(out, "w").write(json.dumps(rows))
open({log!r}, "a").write({own!r} + " " + " ".join(sys.argv[1:-2]) + "\\n")
"""


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A commit whose benchmark takes 10 ms, in a tree where it takes 8."""
    root, log = tmp_path / "tree", str(tmp_path / "log")
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "built", lambda root: None)
    tool = root / "tools" / "benchmark.py"
    tool.parent.mkdir(parents=True)
    tool.write_text(FAKE.format(time=10.0, own="before", log=log))
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "core.hooksPath=/dev/null")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=root, check=True)
    tool.write_text(FAKE.format(time=8.0, own="after", log=log))
    return log


def test_both_trees_run_their_own_benchmark_in_turns(before: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.compare("HEAD", "score", ["--case", "few"], turns=2) == []
    printed = capsys.readouterr().out
    assert printed.splitlines()[2:] == ["| few | ours | 1.250 | 1.250 to 1.250 |"], "what both have, without rivals"
    assert Path(before).read_text().splitlines() == [
        f"{side} score --case few" for side in ("after", "before", "before", "after")
    ]
    git = subprocess.run(["git", "worktree", "list"], cwd=module.ROOT, capture_output=True, text=True, check=True)
    assert len(git.stdout.splitlines()) == 1, "the other tree is gone"


def test_what_became_slower_in_each_turn_is_returned(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLOOR", 1.3)
    assert module.compare("HEAD", "score", turns=1) == []
    tool = module.ROOT / "tools" / "benchmark.py"
    tool.write_text(tool.read_text().replace("8.0", "12.5"))
    assert module.compare("HEAD", "score", turns=1) == [["few", "ours", "0.800", "0.800 to 0.800"]]


def test_an_unknown_commit_and_a_run_that_fails_are_refused(before: str) -> None:
    with pytest.raises(IosrFastError, match="git worktree"):
        module.compare("none", "score")
    (module.ROOT / "tools" / "benchmark.py").write_text("raise SystemExit('no such subject')")
    with pytest.raises(IosrFastError, match="no such subject"):
        module.compare("HEAD", "score", turns=1)


def test_the_compiled_module_is_built(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("import sys; open('built', 'w').write(' '.join(sys.argv[1:]))")
    module.built(tmp_path)
    assert (tmp_path / "built").read_text() == "-q build_ext --inplace"
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(IosrFastError, match="no compiler"):
        module.built(tmp_path)
