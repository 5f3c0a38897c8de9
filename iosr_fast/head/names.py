"""Names of classes: one set of checks for a fit, a saved classifier and changes, so for HTTP too."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, permutations
from typing import Any

from iosr_fast.exceptions import JOINERS, IosrFastError
from iosr_fast.head.ids import uid_of
from iosr_fast.utils.text import abbreviate

LONGEST = 512  # characters of a name
# Invisible characters of other categories: fillers of Hangul, the grapheme joiner, the blank Braille pattern.
_INVISIBLE = dict.fromkeys([0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, 0xFE0E, 0xFE0F])
# Letters of Cyrillic, then of Greek, that look like a letter of Latin, and that letter.
_LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0455\u0456\u0458\u0501\u04bb\u051b\u051d"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0405\u0406\u0408\u04ae"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf\u0131",
    "aeopcyxsijdhqwABEKMHOPCTYXSIJYABEZHIKMNOPTYXoi",
)
_APOSTROPHES, _QUOTES = "\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4`", "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_TYPED = str.maketrans(dict.fromkeys(_APOSTROPHES, "'") | dict.fromkeys(_QUOTES, '"') | dict.fromkeys(_DASHES, "-"))
_JOINT = re.compile(r"(?<=\w)[\s_-]+(?=\w)")  # not the minus of "B-"
# Words of four letters or more, and blanks between words. A character of Chinese, Japanese or Korean is no letter.
_MISTAKABLE = re.compile(r"[^\W\d_\u2e80-\ud7ff]{4,}|(?<=[^\W\d_]) (?=[^\W\d_])")
logger = logging.getLogger(__name__)


def check_names(class_names: Any, saved: bool = False) -> list[str]:
    """Class names of a fit or a bundle as a list of str.

    Raises IosrFastError unless they are a list of two texts or more, all of them names (`name_fault`), of which none
    looks like another one (`as_seen`) or differs from it in case or typography (quotes, dashes, hyphens, underscores,
    blanks) alone. `saved` names may, with a warning: earlier versions took them.
    """
    if isinstance(class_names, str | bytes | set | frozenset | dict) or not isinstance(class_names, Iterable):
        raise IosrFastError(f"expected class_names to be a list of names, in order, got {type(class_names).__name__}")
    names = []
    for i, name in enumerate(class_names):
        if not isinstance(name, str):
            got = f"{name!r} ({type(name).__name__})"
            raise IosrFastError(f"expected class names to be text, got {got} at position {i}")
        names.append(str.__str__(name))
    if len(names) < 2:
        raise IosrFastError(f"expected at least two classes to tell apart, got {len(names)}: {names}")
    _check_distinct(names, saved)
    return names


def check_new_name(name: Any, others: Sequence[str], saved: bool = False) -> None:
    """`check_names` for one more name, or another name of a class, beside the `others`."""
    if not isinstance(name, str):
        raise IosrFastError(f"expected a class name, got {name!r}, which is no text")
    read = as_seen(name), _as_read(name)
    _check_distinct([*(one for one in others if as_seen(one) == read[0] or _as_read(one) == read[1]), name], saved)


def _check_distinct(names: Sequence[str], saved: bool) -> None:
    for name in names:
        if fault := name_fault(name):
            raise IosrFastError(f"expected class names, got {name!a}, {fault}")
    twins = _twins(names, as_seen)
    if equal := sorted({one for one, other in twins if one == other}):
        raise IosrFastError(f"expected class names to differ, got {abbreviate(equal)} more than once")
    if twins:
        shown = "; ".join(f"{one!a} and {other!a}" for one, other in twins[:5])
        raise IosrFastError(
            f"expected class names to differ, got names that look alike: {shown} (they differ in Unicode "
            "normalisation, invisible characters, blanks, or letters of another script alone)"
        )
    for one, other in _twins(names, _as_read):
        alike = f"{one!r} and {other!r}, which differ in case or typography alone"
        if not saved:
            raise IosrFastError(f"expected class names to differ, got {alike}: write one as the other, or rename it")
        logger.warning("the classes include %s: is one class meant?", alike)


def check_separable(names: Sequence[str], separator: str) -> None:
    """Raise IosrFastError for names that hold the separator of several labels in a table."""
    if held := [name for name in names if separator in name]:
        raise IosrFastError(
            f"several labels a picture: expected class names without {separator!r}, which joins labels in tables, got "
            f"{abbreviate(held)}"
        )


def name_fault(name: str) -> str | None:
    """Why this text can't be a class name, or None."""
    if not as_seen(name):
        return "which is blank"
    if name != name.strip():
        return "which has blanks around it"
    if uid_of(name) is not None:
        return "which is how ids of classes look"
    if len(name) > LONGEST:
        return f"which has more than {LONGEST} characters"
    if name.isascii() and name.isprintable():
        return None
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
        return "which has control characters or is no valid Unicode"
    if any(unicodedata.category(char) == "Cf" and char not in JOINERS for char in name):
        return "which has invisible characters or marks of direction"
    return None


def as_seen(name: str) -> str:
    """Names that look alike have this in common: one normalisation, one script, no invisible characters, single
    blanks."""
    if not name.isascii():  # most are, and a change compares its name with those of all classes
        visible = "".join(char for char in name.translate(_INVISIBLE) if unicodedata.category(char) != "Cf")
        name = unicodedata.normalize("NFC", visible).translate(_LOOKALIKES)
    return " ".join(name.split())


def check_unknown_label(label: Any, classes: Iterable[Any]) -> None:
    """Raise IosrFastError if a label of pictures of no class is no label, or a class has it or looks like it."""
    seen = [as_seen(one) if isinstance(one, str) else one for one in (label, *classes)]
    if seen[0] in seen[1:]:
        raise IosrFastError(
            f"expected a label for unknown pictures that no class has, got {label!r}; choose another word"
        )
    if isinstance(label, str) and (fault := name_fault(label)):
        raise IosrFastError(f"expected a label for unknown pictures, got {label!a}, {fault}")


def _as_read(name: str) -> str:
    """Names of one spelling, whatever their case and typography, have this in common."""
    typed = unicodedata.normalize("NFKC", name.translate(_TYPED)).casefold()
    return _JOINT.sub(" ", as_seen(typed))


def spellings(name: str) -> set[str]:
    """What a name has in common with those that may be it mistyped: how it is read and, of each letter in words of four
    or more and each blank, this with a mark in its place, with one beside it, and without it. So names are close that
    differ in one letter which is replaced, inserted, left out or moved; digits and shorter words count as meant. The
    pages of reports do the same (labels.js).
    """
    found = {read := _as_read(name)}
    for place in chain.from_iterable(range(*word.span()) for word in _MISTAKABLE.finditer(read)):
        before, letter, after = read[:place], read[place], read[place + 1 :]
        found |= {f"{before}_{after}", f"{before}_{letter}{after}", f"{before}{letter}_{after}"}
        found.add(f"{before}{after}\n{letter}")
    return found


def mistyped(pictures: Mapping[str, int]) -> list[tuple[str, str]]:
    """The names that may be another one mistyped, each with that one: close to it (`spellings`), and with at most a
    third of its `pictures`. Names that are read as one are left to `check_names`.

    >>> mistyped({"shrit": 1, "outware": 2, "skirt": 3, "class 1": 1, "shirt": 7, "outwear": 6, "class 2": 9})
    [('outware', 'outwear'), ('shrit', 'shirt')]
    """
    close: dict[str, set[str]] = {}
    for name in pictures:
        for spelling in spellings(name) if len(name) <= LONGEST else ():  # longer ones are refused (`name_fault`)
            close.setdefault(spelling, set()).add(name)
    pairs = {pair for names in close.values() if len(names) > 1 for pair in permutations(names, 2)}
    far_fewer = [(one, other) for one, other in pairs if 3 * pictures[one] <= pictures[other]]
    return sorted((one, other) for one, other in far_fewer if _as_read(one) != _as_read(other))


def _twins(names: Sequence[str], key: Callable[[str], str]) -> list[tuple[str, str]]:
    """Each name with the first one of the same key, if that is another one of the list."""
    first: dict[str, int] = {}
    earlier = [first.setdefault(key(name), i) for i, name in enumerate(names)]
    return [(names[at], names[i]) for i, at in enumerate(earlier) if at != i]
