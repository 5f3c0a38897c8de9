"""Downloads of weights, configurations and tokenizers: one attempt, and one line where there is no network."""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from iosr_fast.utils.require import require

_TIMEOUT_S = 5.0
_COPY_WEIGHTS = "copy the file here and give its path (pretrained=FILE, --pretrained FILE: .safetensors or .pt)"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def downloading(name: str, what: str, advice: str = _COPY_WEIGHTS) -> Iterator[None]:
    """Raise any error of the block as an OSError that names the model and what to do without a network.

    Which library downloads a file, and what it raises, depends on the model. If the hub of Hugging Face does not
    answer, only files that were downloaded earlier are read: its client would try each file again for 20 seconds.
    """
    constants: Any = require("huggingface_hub.constants", "cpu")
    offline, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    unreachable = "" if offline else _unreachable(constants.ENDPOINT)
    if unreachable:
        constants.HF_HUB_OFFLINE = True
        socket.setdefaulttimeout(_TIMEOUT_S)  # of downloads from other hosts, by urllib
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = unreachable or str(error).strip().partition("\n")[0] or type(error).__name__
        fix = f"without a network, {advice}, or take the model 'photographs', which needs none"
        if (place := _unwritable(error)) is not None:
            reason, fix = place, "set HF_HOME to a folder that can be written"
        raise OSError(f"{what} of {name} can't be downloaded or read: {reason}; {fix}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)


def _unreachable(endpoint: str) -> str:
    """Why the hub can't be reached, through the proxies that its client uses; "" if it answers."""
    try:
        _reach(endpoint)
    except Exception as error:  # of the client's HTTP library
        return f"{urlsplit(endpoint).hostname} does not answer ({str(error).strip() or type(error).__name__})"
    return ""


@functools.cache
def _reach(endpoint: str) -> None:
    """Raise an error unless the hub answers, whatever it answers. Asked until it answers once in this process."""
    require("huggingface_hub.utils", "cpu").get_session().head(endpoint, timeout=_TIMEOUT_S)


def _unwritable(error: BaseException | None) -> str | None:
    """The first error in a chain that says that a file can't be written, as text."""
    chain: Any = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _UNWRITABLE:
            return str(chain)
        chain = chain.__cause__ or chain.__context__
    return None
