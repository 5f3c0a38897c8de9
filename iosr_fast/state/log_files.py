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

import msgspec
import numpy as np

from iosr_fast.state.bundle_schema import StateFacts
from iosr_fast.state.state import State
from iosr_fast.state.state_files import state_from_files, state_to_files
from iosr_fast.utils.files import sync_folder


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
    from safetensors.numpy import save, save_file

    state_facts, arrays = state_to_files(state)
    content = json.dumps({**facts, "version": state.version, "state": state_facts}, sort_keys=True)
    files = {name: np.frombuffer(save(held), np.uint8) for name, held in arrays.items()}
    seal = _seal(content, files)
    with private_file(file_of(path, number, "state")) as temporary:
        save_file(files, temporary, {"about": content, "sha256": seal})
    return {"number": number, "sha256": seal}


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """A state that `write_state` wrote, to the last bit, and its facts with "sha256". OSError or ValueError where it is
    missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            files = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if _seal(metadata["about"], files) != metadata["sha256"]:
            raise ValueError(f"{path} is damaged: it does not match its own checksum")
        about = json.loads(metadata["about"])
        facts = msgspec.convert(about.pop("state"), StateFacts)
        state = state_from_files(facts, lambda name: files[name].tobytes() if name in files else None)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no state of an audit log ({error})") from error
    return state, {**about, "sha256": metadata["sha256"]}


def _seal(about: str, files: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(files):
        digest.update(f"{name} {files[name].dtype} {files[name].shape}".encode())
        digest.update(files[name].data)
    return digest.hexdigest()
