"""Bearer tokens: their file, and whose token a request has."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import NamedTuple

from iosr_fast.exceptions import IosrFastError

_SHORTEST = 16  # characters


class Token(NamedTuple):
    """One holder's token; `name` is written into the log."""

    name: str
    secret: str
    may_change: bool  # classes; else it may only predict


def read_tokens(text: str) -> tuple[Token, ...]:
    """One token, which is named "token"; or lines `NAME TOKEN`, or `NAME TOKEN predict` for one that may only predict.

    Raises IosrFastError, which quotes no token.
    """
    lines = [words for line in text.splitlines() if (words := line.split())]
    if [len(words) for words in lines] == [1]:
        lines = [["token", *lines[0]]]
    if not lines or any(len(words) != 2 and words[2:] != ["predict"] for words in lines):
        raise IosrFastError("expected one token, or only lines `NAME TOKEN` and `NAME TOKEN predict`, got another form")
    tokens = tuple(Token(name, secret, not rights) for name, secret, *rights in lines)
    for name, secret, _ in tokens:
        if len(secret) < _SHORTEST or any(not 32 < ord(letter) < 127 for letter in secret):
            raise IosrFastError(
                f"expected a token of at least {_SHORTEST} printable ASCII characters, got {len(secret)} characters "
                f"for {name!r:.40}; `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"
            )
    for kind, values in (("names", [one.name for one in tokens]), ("tokens", [one.secret for one in tokens])):
        if len(set(values)) < len(values):
            raise IosrFastError(f"expected {kind} that differ, because the log says who changed what, got one twice")
    return tokens


def find_token(tokens: Iterable[Token], headers: Iterable[tuple[bytes, bytes]]) -> Token | None:
    """The token in the Authorization of a request; None for no token, a wrong one, or two Authorizations.

    The request is compared with every token, each in constant time, so that the time of an answer tells nothing.
    """
    values = [value for name, value in headers if name == b"authorization"]
    scheme, _, sent = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    same = [token for token in tokens if hmac.compare_digest(sent.strip(), token.secret.encode())]
    return same[0] if same and scheme.lower() == b"bearer" else None
