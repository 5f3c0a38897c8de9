"""Damaged, foreign and forged logs: each is refused in words, and no byte of it is changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from iosr_fast.exceptions import DamagedFileError
from iosr_fast.methods.config import Config
from iosr_fast.store import change_log, log_reader, sqlite_file
from iosr_fast.store.change_log import ChangeLog
from iosr_fast.store.changes import AddExamples, Change, Retune, decode
from iosr_fast.store.head_files import fingerprint
from iosr_fast.store.log_reader import LogReader, read_log
from tests import ROOT
from tests.store.live_parts import random_examples
from tests.store.logs import base, changed, renamed, reopened, write_log

PAGE = sqlite_file.PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.db"


def refused(path: Path, match: str = "is damaged: .*; restore it from a copy, or begin a new log") -> None:
    before = path.read_bytes()
    for read in (reopened, read_log):
        with pytest.raises(ValueError, match=match):
            read(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A log with all kinds of pages, of small snapshots."""
    path = tmp_path_factory.mktemp("logs") / "changes.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change_log, "MOST_CHANGES", 18)
        for module in (change_log, log_reader):
            patch.setattr(module, "PART", 6_000)
        log, state = ChangeLog.open(path, base())
        for number in range(20):
            state = renamed(log, state, "name " * number + "end")
            if number in (8, 9):
                examples = random_examples(np.random.default_rng(1), [1] * 30, state.next_example)
                state = changed(log, state, AddExamples.of(1, examples))
        log.close()
        assert reopened(path).version == 23
    return path.read_bytes()


def read(data: bytes | bytearray) -> object:
    """All that the reader gives of the bytes of a log, in memory; None where it refuses them."""
    if not sqlite_file.is_ours(bytes(data[:100])):
        return None
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(data)
        sqlite_file.protect(db)
        reader = LogReader(db)
        return reader.base, [*reader.rows()], reader.snapshot()
    except (sqlite3.Error, DamagedFileError, UnicodeDecodeError):
        return None
    finally:
        db.close()


@pytest.mark.slow
def test_a_flipped_bit_of_any_byte_is_refused_or_changes_nothing_that_is_read(image: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(log_reader, "PART", 6_000)
    data, written = bytearray(image), read(image)
    bits = np.random.default_rng(0).integers(8, size=len(data)).tolist()
    assert written is not None
    for at, bit in enumerate(bits):
        data[at] ^= 1 << bit
        assert read(data) in (None, written), f"bit {bit} of byte {at}"
        data[at] ^= 1 << bit


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :]


# Pages that are missing; lists of free pages and of free bytes of a page, which only the next change would meet.
HARMFUL = [lambda data, size=size: data[:size] for size in (PAGE // 2, *range(PAGE, 4 * PAGE, PAGE))]


@pytest.mark.parametrize("damage", [*HARMFUL, *map(flipped, (35, 39, 2 * PAGE + 2, 2 * PAGE + 6))])
def test_missing_pages_and_damaged_lists_are_refused(damage: Callable[[bytes], bytes], path: Path) -> None:
    write_log(path)
    path.write_bytes(damage(full := path.read_bytes()))
    assert len(full) == 4 * PAGE
    refused(path)


@pytest.mark.parametrize(
    "damage",
    [
        *map(flipped, (27, 43, 63, 75, 99, 300, PAGE - 1_500, 3 * PAGE - 3_000)),
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data + bytes(PAGE),
        lambda data: data + data,
    ],
)
def test_changes_after_damage_of_bytes_that_nothing_reads_are_kept(
    damage: Callable[[bytes], bytes], path: Path
) -> None:
    states = write_log(path)
    path.write_bytes(damage(path.read_bytes()))
    log, state = ChangeLog.open(path, base())
    assert fingerprint(state) == fingerprint(states[-1])
    for number in range(40):
        state = renamed(log, state, "name " * (number % 9 * 8) + str(number))
    log.close()
    assert fingerprint(reopened(path)) == fingerprint(state)


def test_pages_of_an_older_copy_are_refused(path: Path) -> None:
    """As where the disk lost a write. A whole older copy is a valid log, so it is not refused."""
    log, state = ChangeLog.open(path, base())
    for number in range(3):
        state = renamed(log, state, f"name {number}")
    older = path.read_bytes()
    state = renamed(log, state, "last")
    log.close()
    newer = path.read_bytes()
    for page in range(PAGE, len(newer), PAGE):
        if older[page : page + PAGE] != newer[page : page + PAGE]:
            path.write_bytes(newer[:page] + older[page : page + PAGE] + newer[page + PAGE :])
            refused(path)
    path.write_bytes(older)
    assert reopened(path).version == 4


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE changes(version)")
    db.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "got an empty file"),
        (lambda path: path.write_bytes(b"my own notes"), "got another file"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" * 5000), "got another file"),
        (other_database, "got another SQLite database"),
        (lambda path: path.write_bytes(b'{"base":"0","chain":"1","format":2}\n'), "is a log of version 0.2 .* begin a"),
    ],
)
def test_a_foreign_file_is_refused(make: Callable[[Path], object], said: str, path: Path) -> None:
    make(path)
    refused(path, said)


@pytest.mark.parametrize("name", ["changes.db", "changes.db-journal"])
def test_links_folders_and_devices_are_refused(name: str, path: Path) -> None:
    photograph, place = path.with_name("photograph.jpg"), path.with_name(name)
    photograph.write_bytes(b"\xff\xd8\xff")
    if place != path:
        write_log(path)
    for make in (place.mkdir, lambda: os.mkfifo(place), lambda: place.symlink_to(photograph)):
        make()
        for read in (reopened, read_log):
            with pytest.raises(ValueError, match="to be a regular file or not to exist"):
                read(path)
        place.rmdir() if stat.S_ISDIR(place.lstat().st_mode) else place.unlink()
    assert photograph.read_bytes() == b"\xff\xd8\xff"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another user")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_log_that_can_not_be_written_is_refused_at_the_start(what: str, path: Path) -> None:
    write_log(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        os.chmod(copy, 0o444 if what == "file" else 0o666)
        os.chmod(folder, 0o777 if what == "file" else 0o555)
        base()
        child = os.fork()
        if not child:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                reopened(copy)
            except OSError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.chmod(folder, 0o700)


def test_the_log_of_another_state_is_refused(path: Path) -> None:
    write_log(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the log of another state: expected one that begins from"):
        ChangeLog.open(path, base(1))
    assert path.read_bytes() == before and reopened(path).version == 4  # the refusal has left no lock


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE more(x)",
        "CREATE INDEX more ON changes(version)",
        "CREATE TRIGGER more AFTER INSERT ON changes BEGIN DELETE FROM changes; END",
        "ALTER TABLE changes ADD COLUMN more TEXT",
        "INSERT INTO meta SELECT * FROM meta",
        "DELETE FROM meta",
        "UPDATE meta SET last = CAST(last AS TEXT)",
        "DELETE FROM changes WHERE version = 4",
        "DELETE FROM changes WHERE version = 2",
        "UPDATE changes SET time = 'yesterday' WHERE version = 3",
        "UPDATE changes SET op = CAST(op AS BLOB) WHERE version = 3",
        "UPDATE changes SET rowid = 9 WHERE version = 4",
        "INSERT INTO changes SELECT 5, time, op, record, chain FROM changes WHERE version = 4",
        "INSERT INTO snapshot(part) VALUES(zeroblob(65536))",
        "UPDATE snapshot SET rowid = 9",
        "UPDATE snapshot SET part = 7",
    ],
)
def test_another_program_that_writes_is_noticed(statement: str, path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(change_log, "MOST_CHANGES", 1)  # with a snapshot
    write_log(path)
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    refused(path)


ENDLESS = "WITH RECURSIVE more(base) AS (SELECT 1 UNION ALL SELECT 1 FROM more) SELECT *, 1 AS last FROM more"


@pytest.mark.parametrize(
    ("read", "said"),
    [
        ("reader.read_log(path)", "it has other tables than a log"),  # iosr-fast info
        ("logs.reopened(path)", "it has other tables than a log"),  # iosr-fast serve --log
        ("[*sqlite_file.connect(path, 'ro').execute(endless)]", "interrupted"),
    ],
)
def test_a_query_of_the_file_that_never_ends_is_refused(read: str, said: str, path: Path) -> None:
    write_log(path)
    with sqlite3.connect(path) as db:
        db.executescript(f"ALTER TABLE meta RENAME TO other; CREATE VIEW meta AS {ENDLESS} WHERE base = 2")
    db.close()
    program = f"""
from pathlib import Path
from iosr_fast.store import log_reader as reader, sqlite_file
from tests.store import logs
path, endless = Path({str(path)!r}), "{ENDLESS} WHERE base = 2"
{read}
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=30)
    assert said in done.stderr.splitlines()[-1]


STATE, ROW = base(), np.eye(1, 24, dtype="<f4")
UNIT = ROW.tobytes()
NEW = {"uid": 3, "name": "new", "arrays": {"text": UNIT}, "classes": 4}
BOTH = {"plain": UNIT, "adapted": UNIT}
IMAGE = {"uid": 1, "numbers": (6,), "arrays": BOTH, "pictures": (None,), "images": 7}
FORGED: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown op": ("eval", {}),
    "a name with control characters": ("rename_class", {"uid": 1, "name": "a\x1b[31m"}),
    "a name twice": ("rename_class", {"uid": 1, "name": "class 2"}),
    "a name that is an id": ("rename_class", {"uid": 1, "name": "~7"}),
    "no such class": ("rename_class", {"uid": 8, "name": "new"}),
    "images of a name": ("rename_class", {**IMAGE, "name": "new"}),
    "no class": ("remove_class", {}),
    "another number of a class": ("add_class", {**NEW, "uid": 7}),
    "a class without a text": ("add_class", {**NEW, "arrays": {}}),
    "a text of another width": ("add_class", {**NEW, "arrays": {"text": UNIT[:-4]}}),
    "a text of norm 2": ("add_class", {**NEW, "arrays": {"text": (2 * ROW).tobytes()}}),
    "half a number": ("add_examples", {**IMAGE, "arrays": {**BOTH, "plain": UNIT[:-1]}}),
    "NaN": ("add_examples", {**IMAGE, "arrays": {**BOTH, "adapted": (ROW * np.nan).tobytes()}}),
    "no adapted embeddings": ("add_examples", {**IMAGE, "arrays": {"plain": UNIT}}),
    "adapted queries alone": ("add_examples", {**IMAGE, "arrays": {**BOTH, "query_adapted": UNIT}}),
    "a text of an image": ("add_examples", {**IMAGE, "arrays": {**BOTH, "text": UNIT}}),
    "an unknown array": ("add_examples", {**IMAGE, "arrays": {**BOTH, "more": UNIT}}),
    "the number of another image": ("add_examples", {**IMAGE, "numbers": (5,)}),
    "a number twice": (
        "add_examples",
        {**IMAGE, "numbers": (6, 6), "arrays": {"plain": 2 * UNIT, "adapted": 2 * UNIT}, "pictures": (None, None)},
    ),
    "numbers without images": ("add_examples", {"uid": 1, "numbers": (6,), "images": 7}),
    "fewer pictures": ("add_examples", {**IMAGE, "pictures": ()}),
    "more paths": ("add_examples", {**IMAGE, "paths": ("a", "b")}),
    "more adapted embeddings": ("add_examples", {**IMAGE, "arrays": {**BOTH, "adapted": 2 * UNIT}}),
    "no such image": ("remove_examples", {"numbers": (9,), "images": 5}),
    "an image twice": ("remove_examples", {"numbers": (1, 1), "images": 5}),
    "other counts": ("rename_class", {"uid": 1, "name": "new", "classes": 9}),
    "no config": ("retune", {}),
    "an unknown method": ("retune", {"config": b'{"method":"magic","parameters":{},"reducer":"none","factor":1.0}'}),
    "a parameter out of range": (
        "retune",
        {
            "config": b'{"method":"gda","parameters":{"alpha":1e300},"reducer":"none","factor":1.0,'
            b'"key_precision":"fp32"}'
        },
    ),
}


def change_of(op: str, fields: dict[str, Any]) -> Change:
    return decode(op, msgspec.msgpack.encode({"classes": 3, "images": 6, **fields}))


@pytest.mark.parametrize("case", [*FORGED, "a negative number", "an unknown field", "no record"])
def test_a_forged_change_with_the_right_chain_is_refused(case: str, path: Path) -> None:
    states = write_log(path)
    op, fields = FORGED.get(case, ("rename_class", {}))
    facts = {"classes": 3, "images": 6, **fields}
    odd = {"a negative number": {**facts, "uid": -1}, "an unknown field": {**facts, "run": "this"}, "no record": 7}
    record = msgspec.msgpack.encode(odd.get(case, facts))
    with sqlite3.connect(path) as db:
        chain = db.execute("SELECT chain FROM changes WHERE version = 4").fetchone()[0]
        chain = hashlib.sha256(b"%b5 now %b %b" % (chain, op.encode(), record)).digest()
        db.execute(
            "INSERT INTO changes(rowid, version, time, op, record, chain) VALUES(5, 5, 'now', ?, ?, ?)",
            (op, record, chain),
        )
        db.execute("UPDATE meta SET last = ?", (bytes(4) + chain,))
    db.close()
    with pytest.raises(DamagedFileError, match="the change to version 5 can't be made"):
        reopened(path)
    assert states[-1].version == 4


def test_a_change_that_is_written_right_is_made_as_before(path: Path) -> None:
    """The records above are refused for what they say, not for their form."""
    for op, fields in (("add_class", NEW), ("add_examples", IMAGE)):
        assert change_of(op, fields).replay(STATE).version == 2
    added = random_examples(np.random.default_rng(1), [1] * 3, 6, queries=True)
    added = replace(added, groups=np.array([1, 0, 1]), paths=("a", None, "b"))
    for change in (AddExamples.of(1, added), Retune.of(Config(method="gda", parameters={"alpha": 1.0}))):
        made = change.apply(STATE)
        again = decode(change.op, change.encode(made)).replay(STATE)
        assert fingerprint(again) == fingerprint(made) and again.examples.paths == made.examples.paths
        assert change.op == "retune" or made.examples.groups.tolist() == [0, 1, 2, 3, 7, 6, 7, 4, 5]


@pytest.mark.parametrize(("op", "fields"), [("add_class", NEW), ("rename_class", {**NEW, "uid": 1, "classes": 3})])
def test_a_head_without_texts_takes_records_without(op: str, fields: dict[str, Any]) -> None:
    head = replace(STATE, text=None)
    with pytest.raises(ValueError, match=f"expected no text embedding to {op}, got one"):
        change_of(op, fields).replay(head)
    assert change_of(op, {**fields, "arrays": {}}).replay(head).class_names.count("new") == 1
