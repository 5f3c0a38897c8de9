"""Downloads of weights, configurations and tokenizers: one attempt, and one line where there is no network."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iosr_fast.utils.require import require

_TIMEOUT_S = 5.0
_COPY_WEIGHTS = "copy the file here and give its path (pretrained=FILE, --pretrained FILE: .safetensors or .pt)"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Hub:
    """The hub of Hugging Face. If it does not answer, only files that were downloaded earlier are read: its client
    would try each file again for 20 seconds."""

    unreachable: str  # why; "": it answers, or the client knows that it is offline

    def file(self, repository: str, *names: str) -> Path:
        """The first of these files that a repository, OWNER/NAME or OWNER/NAME@REVISION, has. Raises what the client
        raises: EntryNotFoundError without any, LocalEntryNotFoundError, which is one, if the hub can't be asked."""
        hub = require("huggingface_hub", "cpu")
        repository, _, revision = repository.partition("@")
        options = {"local_files_only": bool(self.unreachable), "etag_timeout": _TIMEOUT_S}
        *better, last = names
        for name in better:
            with suppress(hub.errors.EntryNotFoundError):
                return Path(hub.hf_hub_download(repository, name, revision=revision or None, **options))
        return Path(hub.hf_hub_download(repository, last, revision=revision or None, **options))

    def weights(self, repository: str, name: str) -> Path:
        """A file of weights, or the same ones in safetensors, by the names that open_clip and timm know."""
        safe = name.replace("pytorch_model.bin", "model.safetensors")
        return self.file(repository, str(Path(name).with_suffix(".safetensors")) if safe == name else safe, name)


@contextmanager
def downloading(name: str, what: str, advice: str = _COPY_WEIGHTS) -> Iterator[Hub]:
    """The hub, to fetch files from. Any error of the block is raised as an OSError that names the model and what to do
    without a network: what the libraries raise that read the files depends on the model."""
    constants: Any = require("huggingface_hub.constants", "cpu")
    unreachable = "" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    try:
        yield Hub(unreachable)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = unreachable or str(error).strip().partition("\n")[0] or type(error).__name__
        fix = f"without a network, {advice}, or take the model 'photographs', which needs none"
        if (place := _unwritable(error)) is not None:
            reason, fix = place, "set HF_HOME to a folder that can be written"
        raise OSError(f"{what} of {name} can't be downloaded or read: {reason}; {fix}") from error


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
