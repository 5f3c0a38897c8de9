"""The load test of the HTTP server: what it counts, that it never waits, and that a dead server ends it. No timing is
asserted."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with the dev extra")

from tests.serving.http_client import CLASSES, bundle, load  # noqa: E402
from tools import load_test  # noqa: E402
from tools.serving_load import churn, measure, report  # noqa: E402
from tools.serving_load.client import (  # noqa: E402
    Answer,
    Arrivals,
    Client,
    Queries,
    arrival_times,
    closed_loop,
    make_queries,
    open_loop,
    windows_rps,
)
from tools.serving_load.server import ServerDied, ServerProcess  # noqa: E402
from tools.serving_load.throughput import measure_throughput  # noqa: E402

RUN_KEYS = {
    "load",
    "sent",
    "ok",
    "refused",
    "errors",
    "p50_ms",
    "p99_ms",
    "refusal_p99_ms",
    "rss_mb_start",
    "rss_mb_end",
}
SECONDS = 1
QUICK = ["--seconds", str(SECONDS), "--capacity-seconds", "0.5", "--lone", "20"]


def run_tool(path: Path, *options: str) -> tuple[Any, dict[str, Any]]:
    app = typer.Typer()
    app.command()(load_test.main)
    done = CliRunner().invoke(app, ["--bundle", str(bundle()), "--json", str(path), *options])
    assert path.exists(), done.output
    assert gc.get_freeze_count() == 0, "what stays frozen is reported as leaked by extension modules at exit"
    return done, json.loads(path.read_text())


@pytest.mark.slow
def test_every_request_is_counted_and_every_label_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE_S", 0.1)
    done, made = run_tool(tmp_path / "load.json", *QUICK, "--churn", "--serve", "--decode-threads 1")
    assert done.exit_code == 0, done.output
    assert made["lone_ms"] > 0 and made["capacity_rps"] > 0 and made["capacity_wrong"] == 0
    assert {"device", "versions", "commit", "max_wait_ms", "client_cpu_share"} <= set(made)
    assert made["server_options"][-2:] == ["--decode-threads", "1"]
    assert [run["load"] for run in made["runs"]] == [0.5, 0.8, 1.2]
    for run in [*made["runs"], made["churn"]]:
        assert set(run) >= RUN_KEYS and run["sent"] == run["ok"] + run["refused"] + run["errors"]
        assert run["sent"] == max(1, round(run["load"] * made["capacity_rps"] * SECONDS))
        assert run["ok"] > 0 and run["wrong"] == 0
    changed = made["churn"]
    assert changed["changes"] == 5 + SECONDS * churn.CHANGES_A_SECOND and changed["failed"] == 0, changed
    assert changed["last_version"] == 1 + changed["changes"] and changed["versions_seen"] > 1
    assert changed["torn"] == 0 and changed["answers_with_a_changed_class"] > 0
    assert changed["last_classes_as_told"] and changed["rebuilt"]
    assert {"limit", "measured", "met"} < set(made["goals"][0])
    assert "capacity_rps" in done.output


@pytest.mark.slow
def test_a_server_that_dies_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def killed(server: ServerProcess, *rest: Any) -> Any:
        asyncio.get_running_loop().call_later(0.3, os.kill, server.pid, signal.SIGKILL)
        return await measure.measure_load(server, *rest)

    monkeypatch.setattr(load_test, "measure_load", killed)
    done, made = run_tool(tmp_path / "load.json", *QUICK)
    assert done.exit_code == 1
    assert "the server ended with code -9" in made["error"] and '"status": 200' in made["error"]
    assert made["lone_ms"] > 0 and made["runs"] == [] and "goals" not in made


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerDied, match=r"code 2(.|\n)*nothing-here"):
        ServerProcess(tmp_path / "nothing-here")


@pytest.mark.slow
def test_batches_over_http_are_compared_with_the_engine() -> None:
    queries = make_queries(load(), 8)
    with ServerProcess(bundle(), "--max-batch", "4") as server:
        made = asyncio.run(server.alongside(measure_throughput(server, queries, bundle(), 4, 1, 0.2, rounds=1)))
        memory = asyncio.run(measure.measure_memory(server, queries, measure.Load(1, 5000), 0.02, 20, every_s=0.2))
        server.stop()
    assert made["http_images_per_s"] > 0 and made["engine_images_per_s"] > 0 and made["wrong"] == 0
    assert made["ratio"] == pytest.approx(made["http_images_per_s"] / made["engine_images_per_s"], rel=0.01)
    assert memory["sent"] == round(0.02 * 60 * 20 * 0.8) and memory["errors"] == 0 and len(memory["rss_mb"]) > 3


class Scripted:
    """A server that gives the listed answers in turn."""

    def __init__(self, *answers: Any) -> None:
        self._answers: Iterator[Any] = iter(answers)

    async def answer(self, request: Any) -> Any:
        await request.read()
        told = next(self._answers)
        if told is None:
            request.transport.abort()
            return aiohttp.web.Response()
        status, body, headers = told
        return aiohttp.web.Response(status=status, text=body, headers=headers)

    def ask(self, count: int) -> list[Answer]:
        from aiohttp import web

        async def talk() -> list[Answer]:
            app = web.Application()
            app.router.add_post("/v1/predict", self.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            async with Client(f"http://127.0.0.1:{port}", Queries([b"x"], ["cat"]), 1000) as client:
                answers = [await client.predict(0) for _ in range(count)]
            await runner.cleanup()
            return answers

        return asyncio.run(talk())


def labelled(label: str) -> str:
    return json.dumps({"version": 1, "predictions": [{"label": label}]})


def test_what_counts_as_an_answer() -> None:
    answers = Scripted(
        (200, labelled("cat"), {}),
        (200, labelled("dog"), {}),
        (503, "{}", {"Retry-After": "1"}),
        (503, "{}", {}),
        (504, "{}", {}),
        (200, "{", {}),
        None,
    ).ask(7)
    assert [answer.ok for answer in answers] == [True, True, *[False] * 5]
    assert [answer.wrong for answer in answers] == [False, True, *[False] * 5]
    assert [answer.refused for answer in answers] == [False, False, True, *[False] * 4]
    assert [answer.error for answer in answers[3:6]] == [
        "no Retry-After",
        "status 504",
        "unreadable answer: JSONDecodeError",
    ]
    assert answers[6].status == 0 and answers[6].error
    row = report.row_of(answers, deadline_s=1e-9)
    assert (row["sent"], row["ok"], row["refused"], row["errors"]) == (7, 2, 1, 4)
    assert (row["late"], row["wrong"]) == (2, 1)


def test_latency_counts_from_when_a_request_was_due() -> None:
    answers = [Answer(due=0.01 * i, sent=0.01 * i + 0.5, done=0.01 * i + 0.6, status=200) for i in range(11)]
    row = report.row_of(answers, deadline_s=0.55)
    assert (row["p50_ms"], row["send_lag_p99_ms"], row["late"]) == (600.0, 500.0, 11)
    assert row["sent_rps"] == 100.0 and row["refusal_p99_ms"] is None


def test_an_open_loop_never_waits() -> None:
    asked: list[tuple[int, float]] = []

    async def talk() -> list[int]:
        everyone = asyncio.Event()

        async def ask(number: int, due: float) -> Any:
            asked.append((number, due))
            if len(asked) == 30:
                everyone.set()
            await everyone.wait()  # nobody is answered before the last one has asked
            return number

        return await asyncio.wait_for(open_loop(ask, arrival_times(300, 0.1, Arrivals.EVEN)), 20)

    assert asyncio.run(talk()) == list(range(30))
    assert np.allclose(np.diff([due for _, due in asked]), 1 / 300)


def test_an_open_loop_that_is_cancelled_stops_asking() -> None:
    asked: list[int] = []

    async def talk() -> int:
        async def ask(number: int, due: float) -> Any:
            asked.append(number)
            await asyncio.Event().wait()

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(open_loop(ask, arrival_times(100, 1000, Arrivals.EVEN)), 0.2)
        count = len(asked)
        await asyncio.sleep(0.1)
        return count

    assert asyncio.run(talk()) == len(asked)


def test_poisson_arrivals_have_the_rate_and_are_the_same_each_time() -> None:
    times = arrival_times(200, 50, Arrivals.POISSON, seed=1)
    gaps = np.diff(times)
    assert len(times) == 10_000 and np.array_equal(times, arrival_times(200, 50, Arrivals.POISSON, seed=1))
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05) and gaps.std() == pytest.approx(1 / 200, rel=0.05)
    with pytest.raises(ValueError, match="rate > 0"):
        arrival_times(0, 1, Arrivals.EVEN)


def test_the_capacity_counts_whole_seconds_of_good_answers() -> None:
    answers = [Answer(t, t, t + 0.001, 200) for t in np.arange(0, 4.0, 0.1)]
    answers += [Answer(t, t, t + 0.001, 503) for t in np.arange(2.05, 3.0, 0.1)]
    assert windows_rps(answers, skip_s=1.0) == [10.0, 10.0]  # the last one is not whole


def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    class Counting:
        running = most = 0

        async def predict(self, number: int) -> Answer:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.001)
            self.running -= 1
            return Answer(0.0, 0.0, 0.001, 200, content=number)

    client = Counting()
    answers = asyncio.run(closed_loop(client, 3, 0.2))  # type: ignore[arg-type]
    assert client.most == 3 and {0, 1, 2, 3, 4, 5} <= {answer.content for answer in answers}


def test_an_answer_of_two_versions_is_torn() -> None:
    first = {"version": 4, "classes": [{"class_id": "~0", "name": "a"}, {"class_id": "~1", "name": "b"}]}
    versions = churn.classes_by_version(first, [(6, "~0", None), (5, "~2", "c")])
    assert versions == {4: {"~0": "a", "~1": "b"}, 5: {"~0": "a", "~1": "b", "~2": "c"}, 6: {"~1": "b", "~2": "c"}}
    for version, inner, names, ids, torn in (
        (5, 5, ("c", "a"), ("~2", "~0"), False),
        (4, 4, ("b", "a"), ("~1", "~0"), False),
        (4, 4, ("c", "a"), ("~2", "~0"), True),  # not there yet
        (6, 6, ("b", "a"), ("~1", "~0"), True),  # gone
        (5, 5, ("b", "a"), ("~2", "~0"), True),  # another's name
        (5, 4, ("c", "a"), ("~2", "~0"), True),
        (7, 7, ("b", "c"), ("~1", "~2"), True),  # a version that no change told of
        (5, 5, ("c",), ("~2",), True),  # too few
        (5, 5, ("c", "c"), ("~2", "~2"), True),
    ):
        assert churn.is_torn(2, (version, inner, names, ids), versions) is torn, (version, names)
    assert not churn.is_torn(5, (6, 6, ("b", "c"), ("~1", "~2")), versions)


def test_goals_that_are_missed_are_named() -> None:
    good = {"load": 0.5, "p99_ms": 10.0, "refused": 0, "errors": 0, "late": 0, "wrong": 0, "refusal_p99_ms": None}
    over = {**good, "load": 1.2, "p99_ms": 900.0, "refused": 7, "refusal_p99_ms": 51.0}
    made = report.goals(
        {"lone_ms": 3.0, "max_wait_ms": 2.0, "runs": [good, {**good, "load": 0.8, "p99_ms": 11.5}, over]}
    )
    missed = [goal["goal"] for goal in made if goal["met"] is False]
    assert missed == ["p99_ms <= 3 lone_ms + max_wait_ms at 0.8 x capacity", "refusal_p99_ms <= 50 at 1.2 x capacity"]
    told = {"lone_ms": 3.0, "max_wait_ms": 2.0, "runs": [], "throughput": {"ratio": 0.89}}
    told["churn"] = {"failed": 0, "torn": 1, "rebuilt": False}
    missed = [goal["goal"] for goal in report.goals(told) if goal["met"] is False]
    assert missed == ["throughput ratio >= 0.9", "no torn answer", "the log restores the same state"]


def test_a_bundle_that_does_not_load_is_said_before_anything_starts(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(load_test.main)
    done = CliRunner().invoke(app, ["--bundle", str(tmp_path), "--json", str(tmp_path / "load.json")])
    assert done.exit_code == 2 and "expected a saved classifier" in done.output
    assert len(load().classes_) == CLASSES
