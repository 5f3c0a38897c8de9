"""Bundles whose hashes are right and whose content is not: what nothing of iosr_fast wrote is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.methods.config import Evidence
from iosr_fast.sealed.manifest import seal, write_manifest
from iosr_fast.sealed.schema import facts_to_json
from iosr_fast.store.bundle import load, save
from tests.store.live_parts import ENGINE_FACTS, saved_classifier, small_classifier
from tests.store.manifests import rewrite_manifest, sign_again

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all files that a bundle may have."""
    parts = load(saved_classifier(tmp_path_factory.mktemp("saved")))
    assert parts.head.unknown is not None and parts.head.out_of_fold is not None  # which are saved once used
    save(parts, folder := tmp_path_factory.mktemp("used") / "bundle")
    return folder


@pytest.fixture
def bundle(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def part(name: str, **facts: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change of an object in the manifest; a value "-" takes the field out."""

    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        made = {**manifest[name], **facts}
        return {name: {key: value for key, value in made.items() if value != "-"}}

    return change


TUNED = facts_to_json(Evidence(accuracy=0.9, scored=40, protocol="loo", log_loss=0.3, settings=1))
NAMES = [f"motif {i}" for i in range(5)]
FACTS: dict[str, Any] = {
    "names that look alike": {"class_names": [*NAMES[:4], "m\u043etif 0"]},
    "a name with an escape": {"class_names": [*NAMES[:4], "a\x1b[31mb"]},
    "a number twice": {"class_numbers": [0, 1, 2, 3, 3]},
    "the next image's number is taken": {"next": [5, 14]},
    "another tau than the plan's": {"tau": 21.0},
    "an unknown method": {"method": "magic"},
    "a parameter out of range": {"parameters": {"alpha": 40.0, "beta": 5000.0}},
    "no reducer, and its arrays": {"reducer": "none"},
    "keys of the plan that are not stored": part("plan", keys="support"),
    "a plan of another precision": {"key_precision": "int8"},
    "a plan without a constant": part("plan", tau="-"),
    "a plan with another constant": part("plan", gamma=1.0),
    "a constant that is none": part("plan", query="both"),
    "a constant out of range": part("plan", beta=5000.0),
    "a larger thumbnail than a number has": part("views", thumbnail=2**70),
    "pictures of another size": part("preprocessing", image_size=16),
    "another CLIP": {"clip_fingerprint": "b" * 64},
    "a text encoder of another CLIP": part("text", clip_fingerprint="b" * 64),
    "files of a text encoder that is not there": {"text": None},
    "paths for other classes": {"paths": [["a"]]},
    "a node at two places": {"paths": [["a"], ["b", "a"], [], [], []]},
    "a node that is called as a class": {"paths": [["motif 1"], [], [], [], []]},
    "a node with an escape": {"paths": [["a\x1b[31mb"], [], [], [], []]},
    "a path without an end": {"paths": [["a"] * 10**5, [], [], [], []]},
    "a node that is no text": {"paths": [[3], [], [], [], []]},
    "evidence of a later version": {"tuned": {**TUNED, "version": 99}},
    "a note that steers a terminal": {"tuned": {**TUNED, "note": "\x1b[2J"}},
    "a file that nothing reads": lambda manifest: {
        "files": {**manifest["files"], "engine/x.py": manifest["files"]["support.safetensors"]}
    },
}


@pytest.mark.parametrize("case", [*FACTS])
def test_impossible_facts_are_refused(case: str, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    made = FACTS[case](manifest) if callable(FACTS[case]) else dict(FACTS[case])
    gone = [made.pop("-")] if "-" in made else []
    rewrite_manifest(bundle, gone, **made)
    shutil.copyfile(bundle / "support.safetensors", bundle / "engine" / "x.py")
    for verify in (True, False):
        with pytest.raises(ValueError, match="bundle") as refusal:
            load(bundle, verify)
        assert "again" in str(refusal.value), "the message says how to fix it"


def _with(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], dict[str, np.ndarray | None]]:
    return lambda arrays: {name: change(arrays[name])}


def _nan(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed.flat[1] = np.nan
    return changed


def _without(name: str) -> Callable[[Arrays], dict[str, np.ndarray | None]]:
    return lambda arrays: {name: None}


def _calibration(arrays: Arrays) -> dict[str, np.ndarray | None]:
    return {f"calibration_{name}": arrays[name] for name in ("plain", "adapted")}


SUPPORT: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "shuffled owners": _with("owners", lambda a: a[::-1]),
    "an owner that is no class": _with("owners", lambda a: np.where(a == 4, 9, a)),
    "an id twice": _with("ids", lambda a: np.where(a == 3, 4, a)),
    "an id below 0": _with("ids", lambda a: np.where(a == 0, -1, a)),
    "an id that the next image gets": _with("ids", lambda a: a + 1),
    "embeddings with NaN": _with("plain", _nan),
    "embeddings of norm 2": _with("plain", lambda a: 2 * a),
    "no adapted embeddings": _without("adapted"),
    "an unknown array": lambda a: {"more": a["plain"]},
    "labels of several without thresholds": lambda a: {"labels": np.ones((15, 5), np.uint8)},
    "a calibration image that is of no class": lambda a: {"calibration_owners": a["owners"] + 1, **_calibration(a)},
    "calibration images without owners": lambda a: _calibration(a),
    "nothing": lambda a: dict.fromkeys(a, None),
}
PICTURES: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "ends that fall": _with("ends", lambda a: a[::-1]),
}
PATHS: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "a path that is not UTF-8": _with("data", lambda a: a | 0x80),
}
PLAN: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "a key too few": _with("keys", lambda a: a[1:]),
    "no shift": _without("reducer.shift"),
    "no keys": _without("keys"),
    "a linear term of fewer classes": lambda a: {"linear": a["keys"][:4]},
    "a linear term of more channels": lambda a: {"linear": np.tile(a["keys"][:5], 3)},
}
LEFT_OUT: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "logits with NaN": _with("out_of_fold", _nan),
    "some of the arrays": _without("bias"),
    "a unit beyond the images": _with("units", lambda a: np.full_like(a, len(a))),
}
CHANGES = {"support": SUPPORT, "pictures": PICTURES, "paths": PATHS, "plan": PLAN, "left_out": LEFT_OUT}
ARRAYS = {
    f"{name}: {what}": (f"{name}.safetensors", change)
    for name, changes in CHANGES.items()
    for what, change in changes.items()
}


@pytest.mark.parametrize("case", [*ARRAYS])
def test_impossible_arrays_are_refused(case: str, bundle: Path) -> None:
    name, change = ARRAYS[case]
    arrays = load_file(bundle / name)
    changed = {n: np.ascontiguousarray(a) for n, a in (arrays | change(arrays)).items() if a is not None}
    save_file(changed, bundle / name)
    sign_again(bundle)
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"complete classifier: ({name}|plan\.safetensors): .*save it again"):
            load(bundle, verify)


@pytest.mark.parametrize("name", ["support", "plan", "pictures", "paths", "left_out"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x96\x98\x00\x00\x00\x00\x00{", b"PK\x03\x04" * 9])
def test_files_that_are_no_arrays_are_refused(name: str, content: bytes, bundle: Path) -> None:
    (bundle / f"{name}.safetensors").write_bytes(content)
    sign_again(bundle)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors"):
        load(bundle)


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "NaN": lambda text: text.replace(b'"tau": 20.0', b'"tau": NaN'),
    "a number beyond every float": lambda text: text.replace(b'"tau": 20.0', b'"tau": 1e999'),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "lists in lists": lambda text: text.replace(
        b'"views": {', b'"views": ' + b"[" * 5000 + b"]" * 5000 + b', "w": {', 1
    ),
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("case", [*TEXTS])
def test_json_that_two_readers_read_differently_is_refused(case: str, bundle: Path) -> None:
    path = bundle / "manifest.json"
    text = TEXTS[case](path.read_bytes())
    assert text != path.read_bytes()
    path.write_bytes(text)
    if case in ("NaN", "a number beyond every float"):
        path.write_bytes(seal(json.loads(text)))  # with the right checksum, which these can have
    with pytest.raises(ValueError, match="bundle"):
        load(bundle)


ENGINE: dict[str, dict[str, Any]] = {
    "an unknown field": {"load": "this"},
    "a plan that is not there": {
        "plans": {"plans/x.plan": {"runtime": "tensorrt", "version": "10", "gpu": "g", "compute_capability": "9.0"}}
    },
    "a name that steers a terminal": {"model": "\x1b[2J"},
}


@pytest.mark.parametrize("case", [*ENGINE])
def test_impossible_facts_of_an_engine_are_refused(case: str, bundle: Path) -> None:
    rewrite_manifest(bundle / "engine", **ENGINE[case])
    sign_again(bundle)
    for opened in (lambda: load(bundle), lambda: open_engine(bundle / "engine")):
        with pytest.raises(ValueError, match=r"engine is not a complete engine: manifest\.json.*builds it again"):
            opened()
    small = small_classifier(bundle / "engine")
    with pytest.raises(ValueError, match="engine is not a complete engine"):
        small.save(bundle.with_name("again"))
    assert sorted(os.listdir(bundle.parent)) == ["bundle"]


def test_the_hashes_of_the_engines_own_manifest_are_compared(bundle: Path) -> None:
    (bundle / "engine" / "encoder.onnx").write_bytes(b"another graph")
    sign_again(bundle)  # the outer manifest says that all is well
    with pytest.raises(ValueError, match=r"to agree on every file, got two entries for encoder\.onnx"):
        load(bundle, verify=False)
    sign_again(bundle / "engine")
    sign_again(bundle)
    load(bundle)
    sign_again(bundle / "engine", fingerprint="e" * 64)
    sign_again(bundle)
    with pytest.raises(ValueError, match="of another export"):
        load(bundle)


def test_bundles_of_earlier_versions_are_read(bundle: Path) -> None:
    """With the views that keys were means of, without later fields; with the projections of an engine, statistics of
    left-out images, and logits of folds that are not said, which are computed again."""
    arrays = load_file(bundle / "left_out.safetensors")
    for name in ("fold", "scored", "distinct", "units", "counted"):
        del arrays[name]
    former = dict.fromkeys(("odds", "confidence", "right", "log_loss", "class_odds"), np.ones(3))
    save_file({**arrays, **former, "labels": np.zeros(3, np.int64)}, bundle / "left_out.safetensors")
    save_file({"image": np.eye(2, dtype=np.float32)}, bundle / "engine" / "projections.safetensors")
    (bundle / "engine" / "manifest.json").unlink()
    facts = {name: value for name, value in ENGINE_FACTS.items() if name not in ("files", "checksum")}
    write_manifest(bundle / "engine", "engine", facts)
    sign_again(bundle, views={"views": 4, "mirror": False, "seed": 3, "single": True, "templates": ["a {}"]})
    loaded = load(bundle)
    assert loaded.settings == SupportSettings(templates=("a {}",))
    assert not any(loaded.head.computed(name) for name in ("folds", "unknown", "out_of_fold"))
    assert loaded.head.config.look_alikes and len(loaded.head.unknown.weights) == len(arrays["weights"])
    rewrite_manifest(bundle, reducer="isoclip:150,50")
    with pytest.raises(ValueError, match="has the reducer 'isoclip:150,50', which iosr_fast no longer has: fit again"):
        load(bundle)
