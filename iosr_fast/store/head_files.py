"""A Head as JSON-ready facts and arrays by file, the Head made of them, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.head.multi_label import MultiLabelHead, check_own_arrays
from iosr_fast.head.multi_label_predictions import AnyHead
from iosr_fast.methods import METHODS, check_parameters, unavailable_reason
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.fields import ARRAYS as ARRAY_FIELDS
from iosr_fast.scoring.fields import CONSTANT_NAMES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.store.bundle_schema import (
    PICTURE_ARRAYS,
    PLAN_ARRAYS,
    SUPPORT_ARRAYS,
    HeadFacts,
    check_classes,
    check_ends,
    check_examples,
    parse_arrays,
)
from iosr_fast.store.tuned_facts import tuned_to_json

# A bundle has these from its support set.
_FROM_SUPPORT = ("n_classes", "text", "class_offsets")
CONSTANTS = tuple(name for name in CONSTANT_NAMES if name not in _FROM_SUPPORT)
ARRAYS = tuple(field.name for field in ARRAY_FIELDS if field.name not in _FROM_SUPPORT and field.term != "reducer")


def plan_to_files(plan: ScoringPlan, config: MethodConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Constants, JSON-ready, and arrays.

    Left out: text and class offsets, which are the support set's, and keys that are its embeddings as they are. int8
    keys are stored as codes: computing them again takes seconds.
    """
    constants: dict[str, Any] = {name: getattr(plan, name) for name in CONSTANTS}
    constants["cache"] = "none" if plan.keys is None else "dense" if plan.values is not None else "classes"
    arrays = {name: value for name in ARRAYS if (value := getattr(plan, name)) is not None}
    constants["keys"] = "none" if plan.keys is None else "stored"
    if plan.keys is not None and plan.key_precision == "fp32" and config.reducer is None and plan.reducer is None:
        constants["keys"] = "support"
        del arrays["keys"]
    return constants, arrays | reducer_arrays(plan.reducer, "plan_reducer") | reducer_arrays(config.reducer, "reducer")


def plan_from_files(
    constants: Mapping[str, Any], arrays: Mapping[str, np.ndarray], support: SupportSet, config: MethodConfig
) -> ScoringPlan:
    """The plan that `plan_to_files` took apart. Raises ValueError where something doesn't fit."""
    _check_fits(constants, arrays, support, config)
    fields: dict[str, Any] = {name: constants[name] for name in CONSTANTS}
    fields |= {name: arrays.get(name) for name in ARRAYS}
    if constants["keys"] == "support":
        fields["keys"] = image_rows(support.embeddings, constants["query"], None)
    plan = ScoringPlan(
        support.n_classes,
        text=support.text if config.text_weight else None,
        class_offsets=support.class_offsets if constants["cache"] == "classes" else None,
        reducer=reducer_from(arrays, "plan_reducer"),
        **fields,
    )
    if plan.key_precision not in (None, config.key_precision):
        raise IosrFastError(f"expected keys in {config.key_precision}, got {plan.key_precision}")
    return plan


def _check_fits(
    constants: Mapping[str, Any], arrays: Mapping[str, np.ndarray], support: SupportSet, config: MethodConfig
) -> None:
    """That constants, arrays and config say the same of what the plan has."""
    method = METHODS[config.method]
    has_cache = method.scales == "cache" and not (method.weighted and "values" not in arrays)
    expected = {
        "cache": ("dense" if "values" in arrays else "classes") if has_cache else "none",
        "keys": "none" if not has_cache else "stored" if "keys" in arrays else "support",
    }
    if has_cache and not (method.weighted and method.needs_adapter):
        expected["query"] = config.which
    if method.weighted and not method.needs_adapter:
        expected["feature"] = config.which
    for name, value in expected.items():
        if constants[name] != value:
            raise IosrFastError(f"expected {name} {value!r} in the plan of {config.method}, got {constants[name]!r}")
    if method.scales == "linear" and not ("linear" in arrays and constants["feature"] == config.which):
        raise IosrFastError(f"expected a linear term on {config.which} embeddings in the plan of {config.method}")
    if config.text_weight and not math.isclose(constants["tau"], config.text_weight * support.tau, rel_tol=1e-6):
        raise IosrFastError(f"expected tau {config.text_weight * support.tau:g} in the plan, got {constants['tau']:g}")


def reducer_arrays(reducer: Reducer | None, name: str) -> dict[str, np.ndarray]:
    parts = () if reducer is None else (("shift", reducer.shift), ("projection", reducer.projection))
    return {f"{name}.{part}": array for part, array in parts if array is not None}


def reducer_from(arrays: Mapping[str, np.ndarray], name: str) -> Reducer | None:
    shift, projection = arrays.get(f"{name}.shift"), arrays.get(f"{name}.projection")
    return None if shift is None and projection is None else Reducer(shift, projection)


SUPPORT, PLAN, PICTURES = "support.safetensors", "plan.safetensors", "pictures.safetensors"
Arrays = dict[str, np.ndarray]


def head_to_files(head: AnyHead) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """Facts (bundle_schema.HeadFacts), and the arrays of each file; a file without arrays is left out."""
    config = head.config
    constants, plan_arrays = plan_to_files(head.plan, config)
    facts = {
        "class_names": list(head.class_names),
        "class_numbers": list(head.uids),
        "version": head.version,
        "next": [head.next_class, head.next_example],
        "method": config.method,
        "parameters": config.parameters,
        "reducer": config.reducer_name,
        "factor": config.factor,
        "key_precision": config.key_precision,
        "tau": head.tau,
        "plan": constants,
        **({} if config.tuned is None else {"tuned": tuned_to_json(config.tuned)}),
    }
    arrays = {SUPPORT: _support_arrays(head), PLAN: plan_arrays}
    if any(head.examples.pictures):
        arrays[PICTURES] = _packed(head.examples.pictures)
    contiguous = {file: {n: np.ascontiguousarray(a) for n, a in parts.items()} for file, parts in arrays.items()}
    return facts, {file: parts for file, parts in contiguous.items() if parts}


def head_from_files(facts: HeadFacts, read: Callable[[str], bytes | None]) -> AnyHead:
    """The head that `head_to_files` took apart; `read` gives a file's bytes, None where there is none.

    Raises ValueError, naming file or field, for what no head can be.
    """
    names, numbers = facts.class_names, facts.class_numbers
    with _naming("manifest.json"):
        check_classes(names, numbers, facts.next[0])
        parameters = check_parameters(facts.method, **facts.parameters)
        if missing := sorted(set(METHODS[facts.method].parameters) - set(parameters)):
            raise IosrFastError(
                f"expected the parameters {', '.join(missing)} of {facts.method}, got none of that name"
            )
        tuned = None if facts.tuned is None else facts.tuned.tuned()
        if tuned is not None and tuned.version > facts.version:
            raise IosrFastError(f"expected tuned.version up to version, {facts.version}, got {tuned.version}")
    sizes = {"C": len(names), "C1": len(names) + 1}
    arrays = _arrays(SUPPORT, read, SUPPORT_ARRAYS, sizes)
    sizes["D2"] = 2 * sizes["D"]
    derived = _arrays(PLAN, read, PLAN_ARRAYS, sizes)
    pictures = _arrays(PICTURES, read, PICTURE_ARRAYS, sizes)
    with _naming(PICTURES):
        if pictures:
            check_ends(pictures["ends"], len(pictures["data"]))
    with _naming(SUPPORT):
        check_examples(arrays["owners"], arrays["ids"], numbers, facts.next[1])
        for name in ("query", "unknown"):
            if f"{name}_adapted" in arrays and f"{name}_plain" not in arrays:
                raise IosrFastError(f"expected {name}_plain where {name}_adapted is given, got it alone")
        examples, own = _examples(arrays, pictures or None), check_own_arrays(arrays, names)
        support = examples.as_support(numbers, arrays["text"], facts.tau)
        if (reason := unavailable_reason(facts.method, support)) is not None:
            raise IosrFastError(reason)
    with _naming(PLAN):
        reducer = reducer_from(derived, "reducer")
        config = MethodConfig(facts.method, parameters, facts.reducer, reducer, facts.factor, facts.key_precision)
        config = replace(config, tuned=tuned)
        if METHODS[facts.method].needs_support and (reducer is None) != (facts.reducer == "none"):
            raise IosrFastError(f"expected arrays of the reducer {facts.reducer!r}, got {sorted(derived)}")
        plan = plan_from_files(msgspec.structs.asdict(facts.plan), derived, support, config)
    data = tuple(names), tuple(numbers), arrays["text"], facts.tau, examples, config, facts.version, *facts.next
    head: AnyHead = MultiLabelHead(*data, **own) if own else Head(*data, _embeddings(arrays, "unknown_"))
    return head.with_computed(plan=plan)


def fingerprint(head: AnyHead) -> str:
    """SHA-256, in hex, over classes, support images and their pictures, method, parameters and reducer."""
    config, examples = head.config, head.examples
    facts = {
        "names": head.class_names,
        "uids": head.uids,
        "tau": head.tau,
        "numbers": [head.next_class, head.next_example],
        "recipe": [config.method, config.parameters, config.reducer_name, config.factor, config.key_precision],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    arrays = [] if head.text is None else [head.text]
    if config.reducer is not None:
        arrays += [a for a in (config.reducer.shift, config.reducer.projection) if a is not None]
    arrays += [examples.class_ids, examples.ids]
    for rows in (examples.embeddings, examples.queries, head.unknown_images):
        arrays += [] if rows is None else [a for a in (rows.plain, rows.adapted) if a is not None]
    arrays += head.own_arrays().values()
    digest.update(b"".join(hashlib.sha256(picture or b"").digest() for picture in examples.pictures))
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DamagedFileError(f"{file}: {error}") from error


def _arrays(file: str, read: Callable[[str], bytes | None], forms: Mapping[str, Any], sizes: dict[str, int]) -> Arrays:
    content = read(file)
    with _naming(file):
        if content is not None:
            return parse_arrays(content, forms, sizes)
        if needed := [name for name, form in forms.items() if form.needed and file == SUPPORT]:
            raise IosrFastError(f"expected the arrays {', '.join(needed)}, got no such file")
    return {}


def _support_arrays(head: AnyHead) -> Arrays:
    examples = head.examples
    arrays = {"owners": examples.class_ids, "ids": examples.ids, **({} if head.text is None else {"text": head.text})}
    for name, rows in (("", examples.embeddings), ("query_", examples.queries), ("unknown_", head.unknown_images)):
        if rows is not None:
            arrays[f"{name}plain"] = rows.plain
            if rows.adapted is not None:
                arrays[f"{name}adapted"] = rows.adapted
    return arrays | head.own_arrays()


def _examples(arrays: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray] | None) -> Examples:
    embeddings, queries, ids = _embeddings(arrays, ""), _embeddings(arrays, "query_"), arrays["ids"]
    assert embeddings is not None
    shown = (None,) * len(ids) if pictures is None else _unpacked(pictures)
    return Examples(embeddings, arrays["owners"], ids, shown, queries)


def _embeddings(arrays: Mapping[str, np.ndarray], name: str) -> Embeddings | None:
    plain = arrays.get(f"{name}plain")
    return None if plain is None else Embeddings(plain, arrays.get(f"{name}adapted"))


def _packed(pictures: tuple[bytes | None, ...]) -> Arrays:
    """Pictures of any length in two arrays; an empty one stands for none."""
    lengths = [0 if picture is None else len(picture) for picture in pictures]
    data = np.frombuffer(b"".join(picture or b"" for picture in pictures), np.uint8)
    return {"data": data, "ends": np.cumsum(lengths, dtype=np.int64)}


def _unpacked(arrays: Mapping[str, np.ndarray]) -> tuple[bytes | None, ...]:
    data, ends = arrays["data"].tobytes(), arrays["ends"].tolist()
    return tuple(data[start:end] or None for start, end in zip([0, *ends], ends, strict=False))
