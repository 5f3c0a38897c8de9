"""A head as the facts and arrays of a bundle, the head made of them, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.names import check_separable
from iosr_fast.methods import METHODS, conformal
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.links import Sigmoid
from iosr_fast.methods.ood_scores import score_names
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.unknown import Unknown, count_unscored
from iosr_fast.scoring import fields
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.sealed.schema import facts_to_json, refused
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.store.bundle_arrays import (
    LEFT_OUT,
    PATHS,
    PICTURES,
    PLAN,
    PLAN_ARRAYS,
    SUPPORT,
    Arrays,
    are_complete,
    arrays_of,
    naming,
    parts_of,
    read_arrays,
)
from iosr_fast.store.bundle_schema import HeadFacts

CONSTANTS = [field.name for field in fields.CONSTANTS if field.name != "n_classes"]
_UNKNOWN = ("weights", "bias", "left_out", "auroc", "counted")
_FOLDS = ("fold", "scored", "distinct", "units")
_OF_CLASSIFIER = ("method", "parameters", "reducer", "factor", "key_precision")


def head_to_files(head: Head) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The facts (bundle_schema.HeadFacts), JSON-ready, and the arrays of each file (bundle_arrays.TABLE).

    Keys that are the embeddings of the support images are stored once. int8 keys are stored as codes: computing them
    again takes seconds. What left-out images say is stored: the temperature, so that no probability waits for it, and
    what has been used.
    """
    plan, examples = head.plan, head.examples
    if not head.is_multi_label:
        head.folds, head.temperature  # noqa: B018
    computed = {name: head.computed(name) for name in ("folds", "temperature", "unknown", "out_of_fold")}
    pictures = _packed(examples.pictures)
    paths = _packed([None if path is None else path.encode() for path in examples.paths])
    files = arrays_of({**_parts(head), **computed, "pictures": pictures, "paths": paths, "plan": plan})
    constants = {name: getattr(plan, name) for name in CONSTANTS}
    constants["cache"] = "none" if plan.keys is None else "classes" if plan.values is None else "dense"
    constants["keys"] = "none" if plan.keys is None else "stored"
    if plan.key_precision == "fp32" and plan.reducer is None:
        constants["keys"] = "support"
        del files[PLAN]["keys"]
    facts = HeadFacts(
        class_names=list(head.class_names),
        class_numbers=list(head.uids),
        version=head.version,
        next=(head.next_class, head.next_example),
        tau=head.tau,
        plan=constants,
        paths=None if head.paths is None else [list(path) for path in head.paths],
        **msgspec.structs.asdict(head.config),
    )
    written = facts_to_json(facts)
    if head.paths is None:
        del written["paths"]  # so that earlier versions read it
    if head.config.key_precision is None:
        del written["key_precision"]
    return written, {file: arrays for file, arrays in files.items() if arrays}


def head_from_files(facts: HeadFacts, read: Callable[[str], bytes | None]) -> Head:
    """The head that `head_to_files` took apart; `read` gives a file's bytes, None where there is none.

    Raises DamagedFileError, naming file or field, for what no head can be.
    """
    with naming("manifest.json"):
        facts.check_head()
    names, uids = tuple(facts.class_names), tuple(facts.class_numbers)
    sizes = {"C": len(names), "last id": facts.next[1] - 1}
    arrays, of_plan, pictures, paths = (read_arrays(file, read, sizes) for file in (SUPPORT, PLAN, PICTURES, PATHS))
    with naming(PICTURES):
        thumbnails = _unpacked(pictures, sizes["N"])
    with naming(PATHS):
        files = tuple(None if path is None else path.decode() for path in _unpacked(paths, sizes["N"])) if paths else ()
    with naming(SUPPORT):
        parts = parts_of(SUPPORT, arrays)
        of_head = parts["head"]
        examples = Examples(**of_head["examples"], class_ids=parts["owners"], pictures=thumbnails, paths=files)
        _check_owners("owners", examples, uids)
        if (np.diff(examples.class_ids) < 0).any() or len(np.unique(examples.ids)) < len(examples):
            raise IosrFastError("expected owners that don't fall and ids that differ, got others")
        calibration = None
        if are_complete(arrays, ("calibration_owners", "calibration_plain")):
            calibration = Examples.numbered(**of_head["calibration_images"], class_ids=parts["calibration_owners"])
            _check_owners("calibration_owners", calibration, uids)
        if are_complete(arrays, ("labels", "thresholds")):
            if calibration is not None:
                are_complete(arrays, ("calibration_plain", "calibration_labels"))
                calibration = calibration.labelled(parts["calibration_labels"], uids)
            check_separable(names, SEPARATOR)
            if facts.paths is not None:
                raise IosrFastError("expected no paths of nodes where pictures may have several labels, got some")
            examples = examples.labelled(parts["labels"], uids)
    with naming(PLAN):
        planned = parts_of(PLAN, of_plan)
        reducer = _reducer(planned.get("head", {}))
        if METHODS[facts.method].needs_support and (reducer is None) != (facts.reducer == "none"):
            raise IosrFastError(f"expected arrays of the reducer {facts.reducer!r}, got {sorted(of_plan)}")
    above = tuple(map(tuple, facts.paths)) if facts.paths is not None and any(facts.paths) else None
    fitted = examples, facts.config, reducer, facts.version, *facts.next
    others = of_head.get("unknown_images"), calibration, above
    head = Head(names, uids, of_head.get("text"), facts.tau, *fitted, *others)
    link = Sigmoid(parts["thresholds"]) if head.is_multi_label else None
    with naming(SUPPORT):
        if (reason := facts.unavailable_reason(head.support)) is not None:
            raise IosrFastError(reason)
    with naming(PLAN):
        plan = _plan(facts.plan, planned.get("plan", {}), head)
    return head.with_computed(plan=plan, link=link, **_evidence(head, read))


def write_head(head: Head, folder: Path) -> dict[str, Any]:
    """Write the arrays of a head into the folder of a bundle; its facts."""
    from safetensors.numpy import save_file

    facts, files = head_to_files(head)
    for name, arrays in files.items():
        save_file(arrays, folder / name)
    return facts


def read_head(facts: HeadFacts, folder: VerifiedFolder) -> Head:
    """The head of a bundle. Raises DamagedFileError as `head_from_files`, naming the folder."""
    try:
        return head_from_files(facts, lambda name: folder.read(name) if name in folder.files else None)
    except ValueError as error:
        raise refused(folder, str(error)) from error


def head_to_bytes(head: Head) -> bytes:
    """A head, its plan included, as the log holds it."""
    from safetensors.numpy import save

    facts, files = head_to_files(head)
    return msgspec.msgpack.encode((facts, {name: save(arrays) for name, arrays in files.items()}))


def head_from_bytes(data: bytes) -> Head:
    """The inverse of `head_to_bytes`, bit-equal. Raises ValueError for what no head can be."""
    facts, files = msgspec.msgpack.decode(data, type=tuple[HeadFacts, dict[str, bytes]])
    return head_from_files(facts, files.get)


def fingerprint(head: Head) -> str:
    """SHA-256, in hex, over classes and their tree, support images and their pictures, method, parameters and reducer.
    Not over paths of files: it is the same classifier wherever these lie, and a log that begins with it is its own."""
    config = {name: getattr(head.config, name) for name in _OF_CLASSIFIER}
    if not head.config.look_alikes:  # logs of before this setting have the fingerprint without it
        config["look_alikes"] = False
    facts = {
        "names": head.class_names,
        "uids": head.uids,
        "tau": head.tau,
        "numbers": [head.next_class, head.next_example],
        "config": config,
        **({} if head.paths is None else {"paths": head.paths}),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=float).encode())
    digest.update(b"".join(hashlib.sha256(picture or b"").digest() for picture in head.examples.pictures))
    files = arrays_of(_parts(head))
    support = files[SUPPORT]
    of_reducer = files.get(PLAN, {})
    text = [support.pop("text")] if head.text is not None else []
    for array in (*text, *of_reducer.values(), *support.values()):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _parts(head: Head) -> dict[str, Any]:
    """What arrays are of. Where pictures may have several labels, files have an indicator of them, and owners, a class
    a picture, that say nothing."""
    parts: dict[str, Any] = {"head": head, "thresholds": head.thresholds}
    for prefix, images in (("", head.examples), ("calibration_", head.calibration_images)):
        if images is not None and images.owners is not None:
            parts[f"{prefix}labels"] = images.as_support(head.uids, None, head.tau).indicator
        if images is not None:
            parts[f"{prefix}owners"] = images.class_ids if images.owners is None else np.full(len(images), head.uids[0])
    return parts


# --- support images ---


def _check_owners(name: str, examples: Examples, uids: tuple[int, ...]) -> None:
    """Raise IosrFastError for an image of no class."""
    if strange := sorted(set(examples.class_ids.tolist()) - set(uids)):
        raise IosrFastError(f"expected {name} among the class_numbers, got {strange[:5]}")


def _packed(values: Sequence[bytes | None]) -> SimpleNamespace | None:
    """Pictures or paths of any length in two arrays; an empty one stands for none."""
    if not any(values):
        return None
    data = np.frombuffer(b"".join(value or b"" for value in values), np.uint8)
    return SimpleNamespace(data=data, ends=np.cumsum([len(value or b"") for value in values]))


def _unpacked(arrays: Arrays, n: int) -> tuple[bytes | None, ...]:
    if not arrays:
        return (None,) * n
    data = arrays["data"].tobytes()
    edges = [0, *arrays["ends"].tolist()]
    if edges != sorted(edges) or edges[-1] != len(data):
        raise IosrFastError(f"expected ends that rise from 0 to the {len(data)} bytes of data, got others")
    return tuple(data[start:end] or None for start, end in pairwise(edges))


# --- the plan ---


def _plan(constants: Mapping[str, float | str], arrays: Mapping[str, Any], head: Head) -> ScoringPlan:
    """Raises ValueError as ScoringPlan, and where it contradicts the config or its arrays are not those that the
    constants name."""
    support, config = head.support, head.config
    if constants.keys() != {*CONSTANTS, "cache", "keys"}:
        raise IosrFastError(f"expected a plan with {', '.join(CONSTANTS)}, cache and keys, got {sorted(constants)}")
    if (constants["keys"] == "stored") != ("keys" in arrays):
        raise IosrFastError(f"expected an array of keys if they are stored, got {constants['keys']!r} in the manifest")
    values: dict[str, Any] = {name: constants[name] for name in CONSTANTS}
    values |= {field.name: arrays.get(field.name) for field in PLAN_ARRAYS}
    if constants["keys"] == "support":
        values["keys"] = vars(support.embeddings).get(str(constants["query"]))
    plan = ScoringPlan(
        support.n_classes,
        text=support.text if config.text_weight else None,
        class_offsets=support.class_offsets if constants["cache"] == "classes" else None,
        reducer=_reducer(arrays),
        **values,
    )
    if plan.key_precision not in (None, config.key_precision or "fp32"):
        raise IosrFastError(f"expected keys in {config.key_precision or 'fp32'}, got {plan.key_precision}")
    weight = config.text_weight * support.tau  # where pictures may have several labels, before the scale of the head
    if plan.text is not None and support.owners is None and not math.isclose(plan.tau, weight, rel_tol=1e-6):
        raise IosrFastError(f"expected tau {weight:g} in the plan, got {plan.tau:g}")
    return config.with_keys(plan)  # keys that were asked for in fp32 stay so on a GPU


def _reducer(arrays: Mapping[str, Any]) -> Reducer | None:
    return Reducer(**{"shift": None, "projection": None} | arrays["reducer"]) if "reducer" in arrays else None


# --- what left-out images say ---


def _evidence(head: Head, read: Callable[[str], bytes | None]) -> Mapping[str, Any]:
    """The cached properties of a Head that the file LEFT_OUT has. None of several labels, and of older versions, which
    counted other images together and wrote no temperature: what left-out images say is computed again."""
    sizes = {"N": len(head.examples), "last image": len(head.examples) - 1, "C": len(head.uids)}
    arrays = read_arrays(LEFT_OUT, read, sizes)
    with naming(LEFT_OUT):
        if head.is_multi_label or not are_complete(arrays, _FOLDS) or "temperature" not in arrays:
            return {}
        parts = parts_of(LEFT_OUT, arrays)
        scored = arrays["scored"].astype(bool)
        folds = Folds(**parts["folds"] | {"scored": scored})
        if (scored & (folds.fold < 0)).any():
            raise IosrFastError("expected scored of 0 for an image of no fold, got others")
        if not 0.0 < (temperature := float(arrays["temperature"][0])) < math.inf:
            raise IosrFastError(f"expected a temperature above 0, got {temperature}")
        evidence: dict[str, Any] = {"folds": folds, "temperature": temperature}
        if are_complete(arrays, _UNKNOWN):
            names = score_names(head.support, head.needs_adapted, head.unknown_images)
            if len(arrays["weights"]) != len(names):
                raise IosrFastError(f"expected weights of {len(names)} scores, got {len(arrays['weights'])}")
            auroc = float(arrays["auroc"][0]) if len(arrays["auroc"]) else math.nan
            evidence["unknown"] = Unknown(
                head.support,
                names,
                **parts["unknown"] | {"bias": float(arrays["bias"][0]), "auroc": auroc},
                unscored=count_unscored(head.support, folds),
                unknown_images=head.unknown_images,
                basis=conformal.LEFT_OUT if head.calibration_images is None else conformal.CALIBRATION,
            )
        if "out_of_fold" in arrays:
            logits = arrays["out_of_fold"]
            if len(logits) != len(folds.rows):
                raise IosrFastError(f"expected out_of_fold of {len(folds.rows)} images, got {len(logits)}")
            evidence["out_of_fold"] = OutOfFold(folds, head.support.labels[folds.rows], logits)
    return evidence
