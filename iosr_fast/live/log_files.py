"""The files of an audit log beside the one that is written to: closed lines, and the state that these lines made.

    changes.jsonl          lines since the last snapshot
    changes.jsonl.head     how far acknowledged changes go (log_head)
    changes.jsonl.7.state  the state that changes.jsonl begins from, where that is not the bundle's own
    changes.jsonl.6.gz     the lines before that; nothing reads them but recovery and `read_log`

All are readable by their owner alone: they hold pictures.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.bundle import _contiguous, _examples, _packed, _support_arrays
from iosr_fast.live.plan_files import plan_from_files, plan_to_files, reducer_from
from iosr_fast.live.recipe import Recipe
from iosr_fast.live.state import State

_PICTURES = "pictures."
_RECIPE = ("method", "parameters", "reducer_name", "factor", "key_precision")


@contextmanager
def private_file(target: Path) -> Iterator[Path]:
    """A temporary file to write to, which takes the place of `target` when the block ends well. The bytes are on the
    disk before the name is, and the name before this returns."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        temporary.chmod(0o600)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    if os.name != "posix":  # elsewhere a folder can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, on the disk when this returns."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def numbered(path: Path, kind: str) -> dict[int, Path]:
    """The files NAME.<number>.<kind> beside a log, by their rising number."""
    form = re.compile(rf"{re.escape(path.name)}\.([0-9]+)\.{kind}")
    found = ((form.fullmatch(other.name), other) for other in path.parent.iterdir())
    return dict(sorted((int(match[1]), other) for match, other in found if match))


def file_of(path: Path, number: int, kind: str) -> Path:
    return path.with_name(f"{path.name}.{number}.{kind}")


def next_number(path: Path) -> int:
    """A number that no closed lines and no snapshot of this log have."""
    return 1 + max([0, *numbered(path, "gz"), *numbered(path, "state")])


def write_closed(path: Path, number: int, text: bytes) -> None:
    """Keep lines that a snapshot makes needless, compressed."""
    with private_file(file_of(path, number, "gz")) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(text)


def write_state(path: Path, number: int, state: State, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a state beside the log, with `facts` of where in the log it stands; returns what the log says of it."""
    from safetensors.numpy import save_file

    recipe = state.recipe
    constants, arrays = plan_to_files(state.whole_plan, state.support, recipe)
    arrays |= _support_arrays(state)
    if any(state.examples.pictures):
        arrays |= {_PICTURES + name: array for name, array in _packed(state.examples.pictures).items()}
    about = {
        **facts,
        "version": state.version,
        "class_names": state.class_names,
        "class_numbers": state.uids,
        "next": [state.next_class, state.next_example],
        "tau": state.tau,
        "recipe": {name: getattr(recipe, name) for name in _RECIPE},
        "plan": constants,
    }
    content, arrays = json.dumps(about, sort_keys=True), _contiguous(arrays)
    seal = _seal(content, arrays)
    with private_file(file_of(path, number, "state")) as temporary:
        save_file(arrays, temporary, {"about": content, "sha256": seal})
    return {"number": number, "sha256": seal}


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """A state that `write_state` wrote, to the last bit, and its facts with "sha256". OSError or ValueError where it is
    missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if _seal(metadata["about"], arrays) != metadata["sha256"]:
            raise ValueError(f"{path} is damaged: it does not match its own checksum")
        about = json.loads(metadata["about"])
        shown = {name.removeprefix(_PICTURES): arrays.pop(name) for name in list(arrays) if name.startswith(_PICTURES)}
        recipe = Recipe(**about["recipe"], reducer=reducer_from(arrays, "reducer"))
        examples = _examples(arrays, shown or None)
        support = examples.as_support(about["class_numbers"], arrays["text"], about["tau"])
        state = State.first(
            about["class_names"],
            arrays["text"],
            float(about["tau"]),
            examples,
            recipe,
            plan_from_files(about["plan"], arrays, support, recipe),
            about["class_numbers"],
            tuple(about["next"]),
            about["version"],
        )
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no state of an audit log ({error})") from error
    return state, {**about, "sha256": metadata["sha256"]}


def _seal(about: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
