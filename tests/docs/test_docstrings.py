"""Public classes and functions have an example in their docstring, and it runs."""

from __future__ import annotations

import doctest
import importlib
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import iosr_fast
from tests import ROOT
from tests.docs.place import users_place

ON_THE_PAGE = re.findall(r"^::: iosr_fast\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
NAMES = sorted({name for name in (*ON_THE_PAGE, *iosr_fast.__all__) if name != "__version__"})


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with users_place(tmp_path_factory.mktemp("user")) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_public_name_run(name: str) -> None:
    value: Any = pydoc.locate(f"iosr_fast.{name}", forceload=False)
    assert value is not None, f"iosr_fast.{name} does not exist"
    module = value if isinstance(value, ModuleType) else importlib.import_module(value.__module__)
    tests = doctest.DocTestFinder(exclude_empty=True).find(value, name, module)
    assert any(test.examples for test in tests), "expected an example that begins with >>> in its docstring, found none"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
