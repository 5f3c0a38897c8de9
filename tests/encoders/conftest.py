"""A stand-in for CUDA in the GPU runtimes."""

from __future__ import annotations

import pytest


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    """FakeGpu in place of CUDA, where the GPU runtimes ask for torch."""
    torch = pytest.importorskip("torch")
    from iosr_fast.encoders.runtimes import gpu
    from iosr_fast.encoders.runtimes import torch as torch_runtime
    from tests.encoders.fake_gpu import FakeGpu

    fake = FakeGpu()
    for module in (gpu, torch_runtime):
        monkeypatch.setattr(module, "require", lambda module, extra: fake.torch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.results_kept_for.append(stream))
    return fake
