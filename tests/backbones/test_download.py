"""Without a network: one attempt, one line, and what to do instead."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from iosr_fast.backbones import download
from iosr_fast.backbones.download import downloading


@pytest.fixture(autouse=True)
def nothing_cached() -> None:
    download._reach.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real connection, which is refused: the client alone would wait and try again five times for each file."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(OSError, match="does not answer") as got, downloading("ViT", "the weights"):
            hf_hub_download("owner/repository", "weights.bin")
        with downloading("ViT", "the weights"):
            assert constants.HF_HUB_OFFLINE, "files that were downloaded earlier are read"
    said = str(got.value)
    assert said.startswith("the weights of ViT can't be downloaded or read: 127.0.0.1 does not answer (")
    assert "--pretrained FILE" in said and "\n" not in said and not slept
    assert not constants.HF_HUB_OFFLINE and socket.getdefaulttimeout() is None


def test_a_home_that_is_read_only_is_named_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_reach", lambda *_: None)
    read_only = OSError(errno.EROFS, "denied", "/home/me/.cache/huggingface")
    said = r"/home/me.*; set HF_HOME to a folder that can be written"
    with pytest.raises(OSError, match=said), downloading("ViT", "the weights"):
        raise RuntimeError("Failed to download weights") from read_only
