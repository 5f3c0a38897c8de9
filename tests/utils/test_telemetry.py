"""No library under us reports to its makers: none leaves a file in the home folder or looks for another machine."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT
from tests.demo_cache import demo_bundle

pytestmark = pytest.mark.slow  # each works in a process of its own


# Users and CI may set these, and each would hide what happens without.
SETTINGS = {"ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"}
SETTINGS |= {"RAY_USAGE_STATS_ENABLED", "CI", "TF_BUILD", "JENKINS_URL"}

# In a network namespace whose only device is the loopback the kernel counts what finds no route to another machine.
COUNTED = """
import fcntl, pathlib, socket, struct, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
    fcntl.ioctl(device, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
def attempts():
    six = pathlib.Path("/proc/net/snmp6")  # is there only with IPv6
    counters = dict(line.split() for line in six.read_text().splitlines()) if six.exists() else {}
    lines = [line.split() for line in open("/proc/net/snmp")]
    for names, values in zip(lines[::2], lines[1::2]):
        counters.update((names[0] + name, value) for name, value in zip(names[1:], values[1:]))
    watched = ("Ip:OutNoRoutes", "Ip6OutNoRoutes", "Udp:OutDatagrams", "Udp6OutDatagrams")
    return {name: counters[name] for name in watched if counters.get(name, "0") != "0"}
WORK
deadline = time.monotonic() + 0.5
while time.monotonic() < deadline and not attempts():
    time.sleep(0.05)
assert not attempts(), attempts()
"""
PREDICT = """
import sys
from iosr_fast import Classifier
import numpy as np
pictures = np.zeros((2, 64, 64, 3), np.uint8)
classifier = Classifier.load(sys.argv[1], runtime=RUNTIME)
classifier.predict(pictures)
classifier.add_class("something else", pictures)
"""
WORK = {
    "onnxruntime": PREDICT.replace("RUNTIME", "'onnxruntime'"),
    "openvino": PREDICT.replace("RUNTIME", "'openvino'"),
    "open_clip": """
from iosr_fast.backbones.load import load_clip
load_clip("demo").tokenizer(["a photo"])
""",
    "onnxscript": """
import os, pathlib
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import source_of
from tests.backbones.small_clip import small_clip
write_engine(source_of(small_clip(layers=1)), pathlib.Path(os.environ["IOSR_FAST_CACHE"]) / "engine", "onnxruntime")
""",
    "tensorrt_rtx": """
from iosr_fast.utils.require import require
rtx = require("tensorrt_rtx", "tensorrt-rtx")
assert rtx.Builder(rtx.Logger()) is not None
""",
    "ray": """
from iosr_fast.utils.require import require
require("ray", "ray")
from ray._common.usage import usage_lib
assert not usage_lib.usage_stats_enabled()
""",
    "huggingface_hub": """
import iosr_fast, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
""",
}


@cache
def without_network() -> tuple[str, ...] | None:
    """The command that runs another in a network namespace of its own, None where there is none."""
    for command in (("unshare", "--net"), ("unshare", "--net", "--user", "--map-root-user")):
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    return None


@pytest.mark.parametrize("library", WORK)
def test_nothing_is_reported_and_nothing_left_at_home(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS and not name.startswith("XDG_")}
    environment = kept | {"HOME": str(home), "TMPDIR": str(temporary), "IOSR_FAST_CACHE": str(tmp_path / "cache")}
    enclosed = without_network()
    code = COUNTED.replace("WORK", WORK[library]) if enclosed else WORK[library]
    command = [*(enclosed or ()), sys.executable, "-c", code, str(demo_bundle())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(tmp_path)) for top in (home, temporary) for path in top.rglob("*")] == []
    if enclosed is None:
        pytest.skip("the home folder stayed empty; unshare --net is refused here, so lookups were not counted")


def test_what_a_user_sets_is_kept(tmp_path: Path) -> None:
    code = "import iosr_fast, os; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
