"""The demo's CLIP and thirty pictures of three colours, which the tests of training share."""

from __future__ import annotations

import pytest

from tests.training.small import colours


@pytest.fixture(scope="session")
def clip():
    from iosr_fast.backbones.load import load_clip

    return load_clip("demo")


@pytest.fixture(scope="session")
def pictures():
    return colours()
