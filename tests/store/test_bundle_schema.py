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
from iosr_fast.head.support_images import SupportViews
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.store.bundle import load_bundle
from iosr_fast.store.head_files import fingerprint, head_from_files, head_to_files
from iosr_fast.store.tuned_facts import tuned_to_json
from iosr_fast.utils.manifest import seal, write_manifest
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified
from tests.store.live_parts import ENGINE_FACTS, engine_folder, saved_classifier, small_classifier
from tests.store.manifests import rewrite_manifest, sign_again

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_classifier(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def bundle(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def part(name: str, **facts: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change of an object in the manifest; None of a name that starts with "-" takes a field out."""

    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        made = {**manifest[name], **{key: value for key, value in facts.items() if value != "-"}}
        return {name: {key: value for key, value in made.items() if facts.get(key) != "-"}}

    return change


TUNED = tuned_to_json(Tuned("gda", "none", {"alpha": 0.5}, 0.9, 40, "loo", 0.95, log_loss=0.3, settings=1))

NAMES = [f"motif {i}" for i in range(5)]
FACTS: dict[str, Any] = {
    "two classes of one name": {"class_names": [*NAMES[:4], "motif 0"]},
    "a blank name": {"class_names": [*NAMES[:4], "  "]},
    "a name like an id": {"class_names": [*NAMES[:4], "~3"]},
    "names that look alike": {"class_names": [*NAMES[:4], "m\u043etif 0"]},
    "a name with a mark of direction": {"class_names": [*NAMES[:4], "a\u202eb"]},
    "a name with an escape": {"class_names": [*NAMES[:4], "a\x1b[31mb"]},
    "a name that is a number": {"class_names": [*NAMES[:4], 4]},
    "names in one string": {"class_names": "motif"},
    "no classes": {"class_names": [], "class_numbers": []},
    "a class too few": {"class_names": NAMES[:4], "class_numbers": [0, 1, 2, 3]},
    "a class too many": {"class_names": [*NAMES, "more"], "class_numbers": [0, 1, 2, 3, 4, 5], "next": [6, 15]},
    "a number twice": {"class_numbers": [0, 1, 2, 3, 3]},
    "numbers that fall": {"class_numbers": [4, 3, 2, 1, 0]},
    "a negative number": {"class_numbers": [-1, 1, 2, 3, 4]},
    "numbers as floats": {"class_numbers": [0.0, 1.0, 2.0, 3.0, 4.5]},
    "a truth value as number": {"class_numbers": [False, True, 2, 3, 4]},
    "a huge number": {"class_numbers": [0, 1, 2, 3, 2**70]},
    "numbers in words": {"class_numbers": ["0", "1", "2", "3", "4"]},
    "fewer numbers than names": {"class_numbers": [0, 1, 2, 3]},
    "numbers that are no list": {"class_numbers": {"0": 1}},
    "the next class's number is taken": {"next": [4, 15]},
    "the next image's number is taken": {"next": [5, 14]},
    "one next number": {"next": [5]},
    "three next numbers": {"next": [5, 15, 1]},
    "no tau": {"tau": None},
    "tau NaN": {"tau": float("nan")},
    "tau infinite": {"tau": float("inf")},
    "tau 0": {"tau": 0.0},
    "tau below 0": {"tau": -20.0},
    "tau in words": {"tau": "20"},
    "another tau than the plan's": {"tau": 21.0},
    "an unknown method": {"method": "magic"},
    "a method that is a number": {"method": 3},
    "another method": {"method": "gda++", "parameters": {"alpha": 40.0}},
    "a method without a cache": {"method": "zero-shot", "parameters": {}},
    "the plain method": {"method": "tip-adapter"},
    "an unknown parameter": {"parameters": {"alpha": 40.0, "beta": 5.0, "gamma": 1.0}},
    "a parameter too few": {"parameters": {"alpha": 40.0}},
    "a parameter NaN": {"parameters": {"alpha": float("nan"), "beta": 5.0}},
    "a parameter in words": {"parameters": {"alpha": "40", "beta": 5.0}},
    "a parameter that is a truth value": {"parameters": {"alpha": True, "beta": 5.0}},
    "parameters in a list": {"parameters": [40.0, 5.0]},
    "factor 0": {"factor": 0.0},
    "factor NaN": {"factor": float("nan")},
    "an unknown key precision": {"key_precision": "fp4"},
    "another key precision": {"key_precision": "fp16"},
    "an unknown reducer": {"reducer": "magic"},
    "a reducer without directions": {"reducer": "pca:0"},
    "no reducer, and its arrays": {"reducer": "none"},
    "version 0": {"version": 0},
    "a version with a fraction": {"version": 1.5},
    "a plan with another tau": part("plan", tau=19.0),
    "a plan with tau NaN": part("plan", tau=float("nan")),
    "a plan with alpha NaN": part("plan", alpha=float("nan")),
    "a plan with beta below 0": part("plan", beta=-1.0),
    "a plan with temperature 0": part("plan", temperature=0.0),
    "a plan that asks with plain embeddings": part("plan", query="plain"),
    "a plan with an unknown query": part("plan", query="both"),
    "a plan without a cache": part("plan", cache="none"),
    "a plan with a dense cache": part("plan", cache="dense"),
    "a plan with other keys": part("plan", keys="support"),
    "a plan without a constant": part("plan", beta="-"),
    "a plan with one more constant": part("plan", delta=1.0),
    "no views of a picture": part("views", views=0),
    "too many views": part("views", views=10**5),
    "more views than a number has": part("views", views=2**70),
    "a negative seed": part("views", seed=-1),
    "a template of views without a place": part("views", templates=["a photo"]),
    "no templates of views": part("views", templates=[]),
    "too many templates": part("views", templates=["{}"] * 1001),
    "a view's seed in words": part("views", seed="0"),
    "an unknown field of views": part("views", zoom=2),
    "huge thumbnails": part("views", thumbnail=5000),
    "views in a list": {"views": []},
    "pictures of another size": part("preprocessing", image_size=16),
    "another mean": part("preprocessing", mean=[0.5, 0.5, 0.6]),
    "a mean of two channels": part("preprocessing", mean=[0.5, 0.5]),
    "a deviation of 0": part("preprocessing", std=[1.0, 1.0, 0.0]),
    "another interpolation": part("preprocessing", interpolation="nearest"),
    "another CLIP": {"clip_fingerprint": "b" * 64},
    "another adapter": {"adapter_fingerprint": "b" * 64},
    "another encoder": {"encoder_fingerprint": "b" * 64},
    "a fingerprint that is none": {"encoder_fingerprint": ""},
    "a text encoder of another width": part("text", width=25),
    "a text encoder of another CLIP": part("text", clip_fingerprint="b" * 64),
    "a template without a place": part("text", templates=["a photo"]),
    "no templates": part("text", templates=[]),
    "a text encoder without a context": part("text", context_length=0),
    "files of a text encoder that is not there": {"text": None},
    "evidence of an unknown method": {"tuned": {**TUNED, "method": "magic"}},
    "evidence above 100%": {"tuned": {**TUNED, "accuracy": 1.01}},
    "an accuracy of no images": {"tuned": {**TUNED, "scored": 0}},
    "evidence of a later version": {"tuned": {**TUNED, "version": 99}},
    "a note that steers a terminal": {"tuned": {**TUNED, "note": "\x1b[2J"}},
    "evidence with one more field": {"tuned": {**TUNED, "right": [True]}},
    "evidence without a field": {"tuned": {n: v for n, v in TUNED.items() if n != "note"}},
    "an unknown field": {"run": "something"},
    "a missing field": lambda manifest: {"-": "views"},
    "a schema as a float": {"schema": 2.0},
    "a file that nothing reads": lambda manifest: {
        "files": {**manifest["files"], "engine/x.py": manifest["files"]["support.safetensors"]}
    },
}


@pytest.mark.parametrize("what", [*FACTS])
def test_facts_that_no_classifier_has_are_refused(what: str, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    made = FACTS[what](manifest) if callable(FACTS[what]) else dict(FACTS[what])
    gone = [made.pop("-")] if "-" in made else []
    rewrite_manifest(bundle, gone, **made)
    shutil.copyfile(bundle / "support.safetensors", bundle / "engine" / "x.py")
    for verify in (True, False):
        with pytest.raises(ValueError, match="bundle") as told:
            load_bundle(bundle, verify)
        assert "again" in str(told.value), "what to do stands in the message"


def _shuffled(arrays: Arrays) -> Arrays:
    return {"owners": arrays["owners"][::-1]}


def _nan(name: str) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        changed = arrays[name].copy()
        changed[1, 2] = np.nan
        return {name: changed}

    return change


SUPPORT: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "shuffled owners": _shuffled,
    "an owner that is no class": lambda a: {"owners": np.where(a["owners"] == 4, 9, a["owners"])},
    "a negative owner": lambda a: {"owners": np.where(a["owners"] == 0, -1, a["owners"])},
    "owners as floats": lambda a: {"owners": a["owners"].astype(np.float64)},
    "owners in 32 bits": lambda a: {"owners": a["owners"].astype(np.int32)},
    "owners at the ends of int64": lambda a: {"owners": np.where(a["owners"] < 2, -(2**63), 2**63 - 1)},
    "owners in a matrix": lambda a: {"owners": a["owners"][:, None]},
    "an owner too few": lambda a: {"owners": a["owners"][1:]},
    "no owners": lambda a: {"owners": None},
    "an id twice": lambda a: {"ids": np.where(a["ids"] == 3, 4, a["ids"])},
    "a negative id": lambda a: {"ids": a["ids"] - 1},
    "an id that the next image gets": lambda a: {"ids": a["ids"] + 1},
    "an id too few": lambda a: {"ids": a["ids"][1:]},
    "ids without a sign": lambda a: {"ids": a["ids"].astype(np.uint64)},
    "embeddings with NaN": _nan("plain"),
    "adapted embeddings with NaN": _nan("adapted"),
    "texts with NaN": _nan("text"),
    "embeddings of norm 2": lambda a: {"plain": 2 * a["plain"]},
    "texts of norm 0": lambda a: {"text": 0 * a["text"]},
    "embeddings in 64 bits": lambda a: {"plain": a["plain"].astype(np.float64)},
    "embeddings in 16 bits": lambda a: {"plain": a["plain"].astype(np.float16)},
    "wider embeddings": lambda a: {"plain": np.pad(a["plain"], ((0, 0), (0, 1)))},
    "all wider": lambda a: {n: np.pad(a[n], ((0, 0), (0, 1))) for n in ("plain", "adapted", "text")},
    "embeddings in a row": lambda a: {"plain": a["plain"].ravel()},
    "no embeddings": lambda a: {"plain": None},
    "no adapted embeddings": lambda a: {"adapted": None},
    "fewer adapted embeddings": lambda a: {"adapted": a["adapted"][1:]},
    "a text too few": lambda a: {"text": a["text"][1:]},
    "no texts": lambda a: {"text": None},
    "adapted queries alone": lambda a: {"query_adapted": a["adapted"]},
    "an array that nothing reads": lambda a: {"more": a["ids"]},
    "nothing": lambda a: dict.fromkeys(a, None),
}
PICTURES: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "ends that fall": lambda a: {"ends": a["ends"][::-1]},
    "ends beyond the data": lambda a: {"ends": a["ends"] + 1},
    "ends before the data's": lambda a: {"ends": np.minimum(a["ends"], 10)},
    "a negative end": lambda a: {"ends": np.where(np.arange(15) == 0, -5, a["ends"])},
    "a picture too few": lambda a: {"ends": a["ends"][1:]},
    "pictures of another dtype": lambda a: {"data": a["data"].astype(np.int8)},
    "no ends": lambda a: {"ends": None},
}
PLAN: dict[str, Callable[[Arrays], dict[str, np.ndarray | None]]] = {
    "a key too few": lambda a: {"keys": a["keys"][1:]},
    "keys with NaN": _nan("keys"),
    "keys in 32-bit integers": lambda a: {"keys": a["keys"].astype(np.int32)},
    "keys in another precision": lambda a: {"keys": a["keys"].astype(np.float16)},
    "no keys": lambda a: {"keys": None},
    "a shift of another width": lambda a: {"reducer.shift": a["reducer.shift"][1:]},
    "an infinite shift": lambda a: {"plan_reducer.shift": a["plan_reducer.shift"] * np.float32(np.inf)},
    "no shift": lambda a: {"reducer.shift": None},
    "weights with NaN": lambda a: {"weights": np.full(15, np.nan, np.float32)},
    "a linear term over three embeddings": lambda a: {"linear": np.repeat(a["keys"][:5], 3, axis=1)},
    "an unknown array": lambda a: {"colour": a["keys"]},
}
ARRAYS = {
    f"{name}: {what}": (f"{name}.safetensors", change)
    for name, changes in (("support", SUPPORT), ("pictures", PICTURES), ("plan", PLAN))
    for what, change in changes.items()
}


@pytest.mark.parametrize("what", [*ARRAYS])
def test_arrays_that_no_classifier_has_are_refused(what: str, bundle: Path) -> None:
    name, change = ARRAYS[what]
    arrays = load_file(bundle / name)
    changed = {n: np.ascontiguousarray(a) for n, a in (arrays | change(arrays)).items() if a is not None}
    save_file(changed, bundle / name)
    sign_again(bundle)
    for verify in (True, False):
        with pytest.raises(
            ValueError, match=rf"not a complete classifier: ({name}|plan\.safetensors): .*save it again"
        ):
            load_bundle(bundle, verify)


def test_a_linear_term_over_both_embeddings_is_read(bundle: Path) -> None:
    arrays = load_file(bundle / "plan.safetensors")
    linear = np.repeat(arrays["keys"][:5], 2, axis=1)
    save_file({**arrays, "linear": linear}, bundle / "plan.safetensors")
    sign_again(bundle, **part("plan", feature="both")(json.loads((bundle / "manifest.json").read_bytes())))
    plan = load_bundle(bundle).head.plan
    assert plan.feature == "both" and plan.embeddings_read == ("plain", "adapted")
    np.testing.assert_array_equal(plan.linear, linear)
    sign_again(bundle, **part("plan", feature="plain")(json.loads((bundle / "manifest.json").read_bytes())))
    with pytest.raises(ValueError, match=r"plan\.safetensors: expected text, keys and linear of one width"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["support", "plan", "pictures"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x80\x96\x98\x00\x00\x00\x00\x00{", b"PK\x03\x04" * 9])
def test_files_that_are_no_arrays_are_refused(name: str, content: bytes, bundle: Path) -> None:
    (bundle / f"{name}.safetensors").write_bytes(content)
    sign_again(bundle)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors"):
        load_bundle(bundle)


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "NaN": lambda text: text.replace(b'"tau": 20.0', b'"tau": NaN'),
    "a number beyond every float": lambda text: text.replace(b'"tau": 20.0', b'"tau": 1e999'),
    "a number of 5,000 digits": lambda text: text.replace(b'"version": 1', b'"version": ' + b"1" * 5000),
    "half a pair": lambda text: text.replace(b"motif 0", b"\\ud800"),
    "a name twice": lambda text: text.replace(b'"tau": 20.0', b'"tau": 1.0,\n  "tau": 20.0', 1),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "another encoding": lambda text: text.decode().encode("utf-16"),
    "no encoding": lambda text: text.replace(b"motif 0", b"motif \xff"),
    "lists in lists": lambda text: text.replace(
        b'"views": {', b'"views": ' + b"[" * 5000 + b"]" * 5000 + b', "w": {', 1
    ),
    "a list": lambda text: b"[]",
    "a word": lambda text: b"null",
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("what", [*TEXTS])
def test_json_that_two_readers_read_differently_is_refused(what: str, bundle: Path) -> None:
    path = bundle / "manifest.json"
    text = TEXTS[what](path.read_bytes())
    assert text != path.read_bytes()
    path.write_bytes(text)
    if what in ("NaN", "a number beyond every float"):
        path.write_bytes(seal(json.loads(text)))  # with the right checksum, which these can have
    with pytest.raises(ValueError, match="bundle"):
        load_bundle(bundle)


ENGINE: dict[str, dict[str, Any]] = {
    "no width": {"width": 0},
    "a width in words": {"width": "24"},
    "a mean NaN": {"mean": [float("nan"), 0.5, 0.5]},
    "an unknown precision": {"precision": "fp4"},
    "an unknown runtime": {"runtime": "python"},
    "an unknown field": {"load": "this"},
    "batches of none": {"max_batch": 0},
    "a plan that is not there": {
        "plans": {"plans/x.plan": {"runtime": "tensorrt", "version": "10", "gpu": "g", "compute_capability": "9.0"}}
    },
    "a plan of another runtime": {
        "plans": {"encoder.onnx": {"runtime": "x", "version": "1", "gpu": None, "compute_capability": None}}
    },
    "a name that steers a terminal": {"model": "\x1b[2J"},
}


@pytest.mark.parametrize("what", [*ENGINE])
def test_facts_that_no_engine_has_are_refused(what: str, bundle: Path) -> None:
    rewrite_manifest(bundle / "engine", **ENGINE[what])
    sign_again(bundle)
    for opened in (lambda: load_bundle(bundle), lambda: open_engine(bundle / "engine")):
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
        load_bundle(bundle, verify=False)
    sign_again(bundle / "engine")
    sign_again(bundle)
    load_bundle(bundle)
    sign_again(bundle / "engine", files={})
    sign_again(bundle)
    with pytest.raises(ValueError, match=r"two entries for encoder\.onnx"):
        load_bundle(bundle)
    sign_again(bundle / "engine", fingerprint="e" * 64)
    sign_again(bundle)
    with pytest.raises(ValueError, match="of another export"):
        load_bundle(bundle)


def test_bundles_of_before_are_read(bundle: Path) -> None:
    views = json.loads((bundle / "manifest.json").read_bytes())["views"]
    rewrite_manifest(bundle, views={"mirror": views["mirror"], "templates": ["a {}"]})  # before the others came
    assert load_bundle(bundle).views == SupportViews(mirror=views["mirror"], templates=("a {}",))


def test_a_state_is_taken_apart_and_made_again(tmp_path: Path) -> None:
    made = small_classifier(engine_folder(tmp_path / "engine"), key_precision="int8")
    made.save(tmp_path / "bundle")
    held: VerifiedFolder = open_verified(tmp_path / "bundle", "classifier")
    facts, arrays = head_to_files(made.snapshot())
    assert {name: held.manifest[name] for name in facts} == json.loads(json.dumps(facts))
    assert set(arrays) == {"support.safetensors", "plan.safetensors", "pictures.safetensors"}
    from iosr_fast.store.bundle_schema import ClassifierManifest
    from iosr_fast.utils.schema import read_facts

    again = head_from_files(read_facts(held, ClassifierManifest), held.read)
    assert fingerprint(again) == fingerprint(made.snapshot())


@pytest.mark.parametrize("name", ["isoclip", "isoclip:150,50"])
def test_the_reducer_of_version_0_2_that_is_gone_is_refused_in_words(name: str, bundle: Path) -> None:
    rewrite_manifest(bundle, reducer=name)
    with pytest.raises(ValueError, match=f"has the reducer '{name}', which iosr_fast no longer has: fit again with"):
        load_bundle(bundle)


def test_the_projections_in_an_engine_of_version_0_2_are_left_alone(bundle: Path) -> None:
    save_file({"image": np.eye(2, dtype=np.float32)}, bundle / "engine" / "projections.safetensors")
    (bundle / "engine" / "manifest.json").unlink()
    facts = {name: value for name, value in ENGINE_FACTS.items() if name not in ("files", "checksum")}
    write_manifest(bundle / "engine", "engine", facts)
    sign_again(bundle)
    assert load_bundle(bundle).engine == bundle / "engine"
