"""A griffe extension: docstrings as plain text, written for `help()`, become Markdown for the site.

Aligned lists ("name   what it is") become lists, `>>>` examples code, and "<" a character. Docstrings with sections of
NumPy's style stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# "name   description", or only the description, further in, on the lines that follow.
_ENTRY = re.compile(r"(\S.{0,40}?) {2,}(\S.*)$")


class PlainDocstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring and not re.search(r"^-{3,}$", obj.docstring.value, re.MULTILINE):
            obj.docstring.value = "\n\n".join(map(markdown, re.split(r"\n\s*\n", obj.docstring.value)))


def markdown(paragraph: str) -> str:
    lines = paragraph.rstrip().split("\n")
    if lines[0].startswith(">>>"):
        return "\n".join(["```pycon", *lines, "```"])
    if lines[0].startswith("    "):
        return paragraph
    entries = [_ENTRY.match(line) for line in lines]
    if entries[0] and all(entry or line.startswith("   ") for entry, line in zip(entries, lines, strict=True)):
        items = zip(entries, lines, strict=True)
        return "\n".join(f"- `{entry[1]}`: {_text(entry[2])}" if entry else _text(line) for entry, line in items)
    return _text(paragraph)


def _text(text: str) -> str:
    """`text` with "<" as a character, except in code marks."""
    parts = text.split("`")
    parts[::2] = (part.replace("<", "&lt;") for part in parts[::2])
    return "`".join(parts)
