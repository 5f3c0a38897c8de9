"""The benchmark of growing sizes: its cases, its rows and their rates."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import ceilings, harness, scaling, score
from tests.clip.small_clip import small_clip


@pytest.mark.slow
def test_time_by_batch(cached_exports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "load_clip", lambda *_: small_clip(layers=2))
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    made = scaling.encoders("Small", 1, (1, 3), threads=1, repeats=1)
    assert {row["case"] for row in made} == {"small-b1-s1", "small-b3-s1"}
    for row in made:
        batch = int(row["case"].split("-")[1][1:])
        assert (
            row["rate"] == pytest.approx(batch / row["runtime_ms"] * 1e3, rel=1e-2) and row["rate_unit"] == "images/s"
        )


def test_scoring_by_size_times_ours_and_the_two_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "gemm_ceiling_flops", lambda threads: 1e12)
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(harness, "extra_memory_mb", lambda run: 0.0)
    monkeypatch.setattr(score, "Case", SmallCase)
    for name, sizes in {"ENCODERS": (), "QUERIES": (1, 2), "KEYS": (16000,), "CLASSES": (3,)}.items():
        monkeypatch.setattr(scaling, name, sizes)
    made = scaling.run(1, 1)
    expected = {f"q{q}-k16000-d512-c1000" for q in (1, 2, 64)} | {"q64-k16000-d512-c3"}
    assert {row["case"] for row in made} == expected
    for row in made:
        assert row["bench"] == "scaling-score"
        assert row["impl"] in scaling.IMPLEMENTATIONS or row["impl"].startswith("cpp/")


def test_a_case_that_two_sizes_share_is_timed_once() -> None:
    cases = scaling.score_cases(scaling.QUERIES, scaling.KEYS, scaling.CLASSES)
    sizes = len(scaling.QUERIES) + len(scaling.KEYS) + len(scaling.CLASSES)
    assert cases.count("q64-k16000-d512-c1000") == 1 and len(cases) == sizes - 2
    for case in cases:
        assert score.Case.parse(case).width == 512


class SmallCase(score.Case):
    """A case with a thousandth of the keys and few classes, under the name of the whole one."""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> score.Case:
        case = super().parse(text)
        small = cls(case.queries, case.keys // 1000, case.width, min(case.classes, 50))
        object.__setattr__(small, "name", text)
        return small
