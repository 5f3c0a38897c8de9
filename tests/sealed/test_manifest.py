"""manifest.json: every flipped byte is refused, and so is what it may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import parse_manifest, read_manifest, write_manifest
from tests.sealed.test_files import write
from tests.store.manifests import rewrite_manifest


def test_every_flipped_byte_of_a_manifest_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with new_folder(target, "thing") as made:
        (made / "content").write_text("one")
        write_manifest(made, "thing", {"number": 1.5, "names": ["Käfer", "a b"], "none": None, 7: "seven"})  # type: ignore[dict-item]
    path = target / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ 1 << place % 8])
        with pytest.raises(ValueError, match=r"manifest\.json"):
            parse_manifest(whole[:place] + flipped + whole[place + 1 :], target, "thing")
    for changed in (
        whole[:-1],
        whole + b"\n",
        whole.replace(b"\n", b"\r\n"),
        b"",
        b"[]",
        b"[" * 9999,
        b"\xef\xbb\xbf" + whole,
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            read_manifest(target, "thing")
    manifest = json.loads(whole)
    path.write_text(json.dumps({**manifest, "number": 2}, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(
        ValueError, match=r"was changed by hand: it does not match its own checksum; create the thing again"
    ):
        read_manifest(target, "thing")
    path.write_bytes(whole)
    assert read_manifest(target, "thing") == manifest and manifest["names"] == ["Käfer", "a b"]


def test_what_a_manifest_may_not_say(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    files_of = json.loads((target / "manifest.json").read_bytes())["files"]
    rewrite_manifest(target, schema=1)
    with pytest.raises(
        ValueError, match=r"has schema 1, this version of iosr_fast reads schema 2; create the thing again"
    ):
        read_manifest(target, "thing")
    rewrite_manifest(target, schema=2, kind="engine")
    with pytest.raises(ValueError, match="to hold a thing, got a engine"):
        read_manifest(target, "thing")
    rewrite_manifest(target, ["checksum"], kind="thing")
    read_manifest(target, "thing")
    (tmp_path / "outside").write_text("one")
    for name in ("../outside", "inner/../../outside", str(tmp_path / "outside"), "C:/outside", "..\\outside", "\\x"):
        rewrite_manifest(target, files={**files_of, name: files_of["content"]})
        with pytest.raises(ValueError, match="names a file outside its folder"):
            read_manifest(target, "thing")
    for wrong in (3, [], {"content": 3}, {"content": {}}):
        rewrite_manifest(target, files=wrong)
        with pytest.raises(ValueError, match="damaged or not a manifest"):
            read_manifest(target, "thing")
    rewrite_manifest(target, files=files_of)
    (target / "content").write_text("two")
    with pytest.raises(ValueError, match=r"content in .* does not match its manifest"):
        read_manifest(target, "thing")
    read_manifest(target, "thing", verify=False)
    (target / "content").unlink()
    with pytest.raises(FileNotFoundError, match="content is missing from"):
        read_manifest(target, "thing", verify=False)
