"""Part files: what goes in comes out, and what is damaged is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.files.embedding_files import Part, read_part, write_part
from iosr_fast.utils.files import new_file
from tests import ROOT

BAD = 2


def make_part(
    rng: np.random.Generator, n: int = 6, width: int = 5, dtype: str = "float32", adapted: bool = True
) -> Part:
    rows = [rng.standard_normal((n, width)).astype(dtype) for _ in range(1 + adapted)]
    for array in rows:
        array[BAD] = np.nan
    errors = ["it is no image" if i == BAD else None for i in range(n)]
    return Part([f"ä/{i}.png" for i in range(n)], Embeddings(*rows), errors, facts={"plan": "abc", "part": 3})


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_part_comes_back_as_it_was(rng: np.random.Generator, tmp_path: Path, dtype: str, adapted: bool) -> None:
    part, path = make_part(rng, dtype=dtype, adapted=adapted), tmp_path / "part-00000.safetensors"
    write_part(path, part)
    got = read_part(path)
    assert (got.keys, got.errors, got.facts) == (part.keys, part.errors, part.facts)
    np.testing.assert_array_equal(got.embeddings.plain, part.embeddings.plain)
    assert (got.embeddings.adapted is not None) == adapted
    if adapted:
        np.testing.assert_array_equal(got.embeddings.adapted, part.embeddings.adapted)
    assert str(got.embeddings.plain.dtype) == dtype
    first = path.read_bytes()
    write_part(path, part)
    assert path.read_bytes() == first


def test_any_damaged_byte_is_found_or_harmless(rng: np.random.Generator, tmp_path: Path) -> None:
    """A flipped bit anywhere is refused, or changes nothing that is read (bytes that only pad)."""
    part, path = make_part(rng), tmp_path / "part-00000.safetensors"
    write_part(path, part)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            got = read_part(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert (got.keys, got.errors, got.facts) == (part.keys, part.errors, part.facts)
        np.testing.assert_array_equal(got.embeddings.plain, part.embeddings.plain)
        np.testing.assert_array_equal(got.embeddings.adapted, part.embeddings.adapted)
    assert refused > 10
    for length in (0, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_part(path)


def test_what_does_not_fit_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    part, path = make_part(rng), tmp_path / "part-00000.safetensors"
    plain = part.embeddings.plain
    with pytest.raises(ValueError, match=r"the same number of rows in each, got \{'keys': 5"):
        write_part(path, replace(part, keys=part.keys[1:]))
    with pytest.raises(ValueError, match="expected plain"):
        write_part(path, replace(part, embeddings=Embeddings(plain.astype(np.float64))))
    with pytest.raises(ValueError, match="expected adapted"):
        write_part(path, replace(part, embeddings=Embeddings(plain, plain[:, 1:])))
    with pytest.raises(FileNotFoundError, match="expected a part"):
        read_part(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with new_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_importing_loads_nothing_heavy() -> None:
    heavy = {"torch", "pyarrow", "ray", "pandas"}
    code = f"import sys, iosr_fast.cli.embed; print(sorted({heavy} & set(sys.modules)))"
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
