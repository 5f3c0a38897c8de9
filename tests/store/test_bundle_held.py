"""Bundles are saved as they were verified, pinned by a digest, and read whole whoever writes to their place."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from iosr_fast.cli import app
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.store.bundle import load, save
from iosr_fast.store.head_files import fingerprint
from tests import ROOT
from tests.store.live_parts import engine_folder, saved_classifier, small_classifier
from tests.store.manifests import rewrite_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    return saved_classifier(tmp_path / "parts").rename(tmp_path / "bundle")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another engine"])
def test_a_damaged_engine_is_not_saved_under_new_hashes(damage: str, tmp_path: Path) -> None:
    engine = engine_folder(tmp_path / "engine")
    made = small_classifier(engine)
    if damage == "gone":
        (engine / "encoder.onnx").unlink()
    elif damage == "another engine":
        rewrite_manifest(engine, fingerprint="e" * 64)
    else:
        (engine / "encoder.onnx").write_bytes(b"no grapi" if damage == "flipped" else b"no")
    with pytest.raises((ValueError, FileNotFoundError), match=r"encoder\.onnx|another export"):
        made.save(tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path)) == ["engine"]


def test_an_open_bundle_is_saved_again_after_its_folder_changed(bundle: Path) -> None:
    parts = load(bundle)
    (bundle / "engine" / "encoder.onnx").unlink()  # the file is still open
    save(parts, bundle.with_name("again"))
    load(bundle.with_name("again"))
    (bundle / "text" / "text.onnx").write_bytes(b"no grapi")  # changed in place, under its old hash
    with pytest.raises(ValueError, match=r"text\.onnx in .* does not match its manifest"):
        save(parts, bundle.with_name("third"))
    assert sorted(os.listdir(bundle.parent)) == ["again", "bundle", "parts"]


def test_info_prints_the_digest_that_serve_and_load_take(bundle: Path) -> None:
    run = CliRunner()
    shown = run.invoke(app, ["info", str(bundle)])
    digest = shown.stdout.splitlines()[-1].removeprefix("digest ")
    assert digest == open_verified(bundle, "classifier").digest and "classes 5, images 15" in shown.stdout
    engine = run.invoke(app, ["info", str(bundle / "engine")]).stdout.splitlines()[-1]
    assert engine == f"digest {open_verified(bundle / 'engine', 'engine').digest}"
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    served = run.invoke(app, ["serve", str(bundle), "--port", "0", "--expected-digest", other])
    assert served.exit_code == 2 and f"with the digest {other}, got {digest}" in served.output
    (bundle / "engine" / "encoder.onnx").write_bytes(b"no grapi")
    shown = run.invoke(app, ["info", str(bundle)])
    assert shown.exit_code == 2 and "encoder.onnx in" in shown.output and "digest sha256" not in shown.output


SAVING = """
import sys
from pathlib import Path
from tests.store.live_parts import small_classifier
made = small_classifier(Path(sys.argv[1]), seed=int(sys.argv[3]))
print("begins", flush=True)
while True:
    made.save(sys.argv[2])
"""


@pytest.mark.slow
def test_readers_never_fail_while_two_processes_save(tmp_path: Path) -> None:
    engine, target = engine_folder(tmp_path / "engine"), tmp_path / "bundle"
    made = [small_classifier(engine, seed=seed) for seed in (0, 1)]
    known = {fingerprint(one.snapshot()) for one in made}
    made[0].save(target)
    words = [sys.executable, "-c", SAVING, str(engine), str(target)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*words, str(seed)], cwd=ROOT, **pipes) for seed in (0, 1)]
    seen: list[str] = []
    failed: list[BaseException] = []

    def reading(until: float) -> None:
        try:
            while time.monotonic() < until:
                parts = load(target)
                assert parts.files is not None
                assert parts.files.open_with(lambda folder: (folder / "encoder.onnx").read_bytes()) == b"no graph"
                seen.append(fingerprint(parts.head))
        except BaseException as error:
            failed.append(error)

    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "begins\n"
        readers = [threading.Thread(target=reading, args=(time.monotonic() + 1.0,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [writer.poll() for writer in writers] == [None, None], [writer.stderr for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert not failed, failed
    assert set(seen) == known, "both writers' folders were read"
    made[0].save(target)
    assert sorted(os.listdir(tmp_path)) == ["bundle", "engine"], "what the killed writers left is gone"
