"""OpenVINO's models leave the thread's signal stack as it was, in whichever order they are released."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import faulthandler, gc, os, signal
import numpy as np
from iosr_fast.runtimes.signal_stack import signal_stack
from tools.bench.ceilings import _openvino_gemm

faulthandler.enable()
before, seen = signal_stack(), []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
left, weight = np.ones((2, 128, 128), np.float32)
models = [_openvino_gemm(left, weight, 1) for _ in range(3)]
for model in models:
    model()
while models:
    models.pop(0)
    gc.collect()
assert signal_stack() == before, (signal_stack(), before)
os.kill(os.getpid(), signal.SIGUSR1)
assert seen == [1]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sigaltstack is asked for on Linux only")
def test_models_released_in_the_order_they_were_made_leave_the_signal_stack() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
