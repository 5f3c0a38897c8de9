"""What somebody does who took over a decoder by an image: it runs in the process of a decoder, in place of decoding."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import BadImageError
from iosr_fast.images import preprocess
from iosr_fast.images.decoder_process import child
from iosr_fast.images.preprocess import open_image

_LIBC = ctypes.CDLL(None, use_errno=True)
_PTRACE_SEIZE, _NEW_NAMESPACE = 0x4206, 0x20000


def attacks(folder: Path, victim: int, port: int) -> dict[str, Callable[[], Any]]:
    """Each raises OSError if it fails. `folder` holds the files a, b and program, `victim` is another process of this
    user, and something listens at `port`."""
    return {
        "truncate a file": lambda: os.truncate(folder / "a", 0),
        "remove a file": lambda: os.unlink(folder / "b"),
        "create a file": lambda: os.close(os.open(folder / "c", os.O_CREAT | os.O_WRONLY)),
        "change a file's rights": lambda: os.chmod(folder / "a", 0o777),
        "list a folder": lambda: os.listdir(folder),
        "ask for a file": lambda: os.stat(folder / "a"),
        "read a token": lambda: Path(f"/proc/{victim}/environ").read_bytes(),
        "open a TCP socket": socket.socket,
        "open a UDP socket": lambda: socket.socket(type=socket.SOCK_DGRAM),
        "connect": lambda: socket.socket().connect(("127.0.0.1", port)),
        "start a program": lambda: os.posix_spawn(folder / "program", ["program"], {}),
        "fork": lambda: os.fork() or os._exit(0),
        "signal a process": lambda: os.kill(victim, 0),
        "trace a process": lambda: _done(_LIBC.ptrace(_PTRACE_SEIZE, victim, 0, 0)),
        "read a process's memory": lambda: _read_memory(victim),
        "change a process's limits": lambda: resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0)),
        "make a file in memory": lambda: os.memfd_create("program"),
        "enter a name space": lambda: _done(_LIBC.unshare(_NEW_NAMESPACE)),
    }


def _done(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def _read_memory(victim: int) -> None:
    start = int(Path(f"/proc/{victim}/maps").read_text().partition("-")[0], 16)
    buffer = ctypes.create_string_buffer(8)
    here, there = ((ctypes.c_size_t * 2)(place, 8) for place in (ctypes.addressof(buffer), start))
    _done(_LIBC.process_vm_readv(victim, here, 1, there, 1, 0))


def attack(data: bytes, *args: Any, **options: Any) -> Any:
    """For JSON of what `attacks` takes, a BadImageError naming those that succeeded; other images are opened."""
    if data[:1] != b"[":
        return open_image(data, *args, **options)
    folder, victim, port = json.loads(bytes(data))
    succeeded = []
    for name, act in attacks(Path(folder), victim, port).items():
        try:
            act()
            succeeded.append(name)
        except OSError:
            continue
    raise BadImageError(None, 0, json.dumps(succeeded))


def main() -> None:
    preprocess.open_image = attack  # type: ignore[attr-defined]
    child.main()
