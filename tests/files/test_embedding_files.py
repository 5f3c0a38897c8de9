"""Folders of embeddings: what goes in comes out, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.files.embedding_files import KIND, Part, encode_part, iterate_parts, read_embeddings
from iosr_fast.sealed.manifest import write_manifest

BAD = 2


def write(folder: Path, rng: np.random.Generator, dtype: str = "float32", adapted: bool = True) -> Part:
    """A finished folder of one part."""
    rows = [rng.standard_normal((6, 5)).astype(dtype) for _ in range(1 + adapted)]
    for array in rows:
        array[BAD] = np.nan
    errors = ["it is no image" if i == BAD else None for i in range(6)]
    part = Part([f"\u00e4/{i}.png" for i in range(6)], Embeddings(*rows), errors)
    folder.mkdir(exist_ok=True)
    (folder / "part-00000.safetensors").write_bytes(encode_part(part))
    write_manifest(folder, KIND, {"parts": ["part-00000.safetensors"]})
    return part


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_part_comes_back_as_it_was(rng: np.random.Generator, tmp_path: Path, dtype: str, adapted: bool) -> None:
    part = write(tmp_path / "out", rng, dtype, adapted)
    got = read_embeddings(tmp_path / "out")
    assert (got.keys, got.errors) == (part.keys, part.errors) and str(got.embeddings.plain.dtype) == dtype
    np.testing.assert_array_equal(got.embeddings.plain, part.embeddings.plain)
    assert (got.embeddings.adapted is not None) == adapted
    if adapted:
        np.testing.assert_array_equal(got.embeddings.adapted, part.embeddings.adapted)
    assert encode_part(got) == encode_part(part)


def test_a_damaged_or_missing_part_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    write(tmp_path, rng)
    path = tmp_path / "part-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not match its manifest"):
        read_embeddings(tmp_path)
    for length in (0, 8, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part-00000\.safetensors is damaged"):
            list(iterate_parts(tmp_path, verify=False))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00000\.safetensors is missing"):
        list(iterate_parts(tmp_path))
