"""A griffe extension: docstrings as plain text, written for `help()`, become Markdown for the site.

Aligned lists ("name   what it is") become lists, `>>>` examples code, and "<" a character. Docstrings with sections of
NumPy's style stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# "name   description"; a long name may have one space only. Indented lines continue a description.
_FIRST = re.compile(r"\S.{0,40}? {2,}\S")
_ENTRY = re.compile(r"(\S.{0,40}?) {2,}(\S.*)|(\w+(?:, \w+)*) (.*)")


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
    if _FIRST.match(lines[0]):
        return "\n".join(map(_item, lines))
    return _text(paragraph)


def _item(line: str) -> str:
    entry = _ENTRY.match(line)
    return f"- `{entry[1] or entry[3]}`: {_text(entry[2] or entry[4])}" if entry else _text(line)


def _text(text: str) -> str:
    """`text` with "<" as a character, except in code marks."""
    parts = text.split("`")
    parts[::2] = (part.replace("<", "&lt;") for part in parts[::2])
    return "`".join(parts)
