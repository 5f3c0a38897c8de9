"""The command `iosr-fast serve`. Its options are the fields of Settings."""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from iosr_fast.cli.options import argument, as_share
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.http.settings import Option, Settings
from iosr_fast.utils.require import require

TOKEN = "IOSR_FAST_TOKEN"
_SHARES = ("max_error", "check_share")
_REPEATED = {"trusted_proxy": "ADDRESS", "public_host": "NAME", "allow_origin": "URL"}
_Folders = Annotated[
    list[Path],
    argument("CLASSIFIER", "Folder of `iosr-fast fit`, Classifier.save or FewShotHead.save; of several; or an engine."),
]
_TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the bearer token for class changes, or with lines `NAME TOKEN [predict]` [default: the "
        f"variable {TOKEN}; without either, changes are off]."
    ),
]


def serve(classifiers: list[Path], token_file: Path | None = None, **options: Any) -> None:
    """Serve saved classifiers, or an engine for embeddings, over HTTP. Clients with the token may change classes."""
    if sys.platform == "win32":
        raise IosrFastError("expected Linux or macOS: the server needs the processes, limits and signals of POSIX")
    for module in ("fastapi", "uvicorn", "httptools", "prometheus_client", "threadpoolctl"):
        require(module, "serve")
    options |= {name: tuple(options[name]) for name in _REPEATED}
    settings = Settings(token=_token(token_file), **options)
    from iosr_fast.serving.http.server import run

    run(classifiers, settings)


def _token(file: Path | None) -> str | None:
    token = _take_variable(TOKEN)
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise IosrFastError(f"can't read the token in {file}: {error}") from error
    return token or None


def _take_variable(name: str) -> str | None:
    """The value of an environment variable, which is in no environment afterwards: programs that are started from here
    do not get it, and the bytes that the kernel shows as /proc/PID/environ are overwritten."""
    value = os.environ.get(name)
    if value:
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        if place := getenv(name.encode()):
            ctypes.memset(place, 0, len(ctypes.string_at(place)))
    os.environ.pop(name, None)
    return value


def _parameters() -> list[inspect.Parameter]:
    """What typer reads: the classifiers, --token-file, and an option for each field of Settings."""
    kinds: dict[str, tuple[Any, Any]] = {"classifiers": (_Folders, ...), "token_file": (_TokenFile, None)}
    types = get_type_hints(Settings)
    for name, annotation in get_type_hints(Settings, include_extras=True).items():
        for option in get_args(annotation):
            if isinstance(option, Option):
                flag = f"--{name.removesuffix('_s').replace('_', '-')}"
                made = typer.Option(
                    flag,
                    help=option.help,
                    rich_help_panel=option.section or None,
                    metavar={**_REPEATED, **dict.fromkeys(_SHARES, "SHARE")}.get(name),
                    parser=as_share if name in _SHARES else None,
                )
                kinds[name] = Annotated[list[str] if name in _REPEATED else types[name], made], getattr(Settings, name)
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in kinds.items()
    ]


serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
