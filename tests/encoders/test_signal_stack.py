"""OpenVINO leaves the thread's signal stack as it was, and models may be released in any order."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT

SCRIPT = """
import faulthandler, gc, os, signal
import numpy as np
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.encoders.runtimes.signal_stack import signal_stack
from tools.bench.ceilings import _openvino_gemm

faulthandler.enable()
before, seen = signal_stack(), []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
left, weight = np.ones((2, 128, 128), np.float32)
models = [_openvino_gemm(left, weight, 1) for _ in range(3)]
for model in models:
    model()
assert openvino_core() is openvino_core()
while models:
    models.pop(0)
    gc.collect()
assert signal_stack() == before, (signal_stack(), before)
os.kill(os.getpid(), signal.SIGUSR1)
assert seen == [1]
openvino_core.cache_clear()  # as if the plugin were loaded by two, in the order in which they release it
first, second = openvino_core(), openvino_core.__wrapped__()
openvino_core.cache_clear()
del first
gc.collect()
del second
gc.collect()
assert signal_stack() == before, (signal_stack(), before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sigaltstack is asked for on Linux only")
def test_openvino_leaves_the_signal_stack() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
