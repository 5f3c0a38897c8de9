"""One part in a process of its own: python -m tools.gpu.child tools.gpu.ceiling:run --out FILE ..."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from tools.source_tree import use_source_tree

use_source_tree()

from tools.gpu.report import Report, Setting  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="module:function of a report and a setting")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    setting = Setting(given.device, given.tiny, given.work, time.monotonic() + given.seconds)
    report = Report(given.out)
    module, function = given.target.split(":")
    getattr(importlib.import_module(module), function)(report, setting)


if __name__ == "__main__":
    main()
