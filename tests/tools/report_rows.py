"""Made-up rows of every kind, for tests/tools/test_report.py alone: no number here was measured."""

from __future__ import annotations

from typing import Any

MACHINE: dict[str, Any] = {
    "device": "a made-up processor",
    "versions": {"iosr_fast": "0.1.0", "numpy": "9.9"},
    "commit": "0123456789ab",
    "threads": 2,
}


def timing(bench: str, case: str, impl: str, ms: float, **more: Any) -> dict[str, Any]:
    row = {"bench": bench, "case": case, "impl": impl, "precision": "fp32", "runtime_ms": ms}
    return row | {"runtime_ms_spread": [0.97 * ms, 1.05 * ms], "repeats": 7, "ratios": {}} | MACHINE | more


def encoder(case: str, late: int, unit: float, **more: Any) -> list[dict[str, Any]]:
    times = {
        f"eager-two-pass-s{late}": 2.5,
        f"torch-compile-two-pass-s{late}": 2.2,
        f"onnxruntime-two-pass-s{late}": 2.0123,
        "onnxruntime-s0": 1.7,
        f"onnxruntime-s{late}": 1.1,
        f"openvino-s{late}": 1.05,
        "onnxruntime-one-pass": 1.0,
    }
    rival = f"eager-two-pass-s{late}"
    return [
        timing(
            *("encoder", case, impl, unit * factor),
            ratios={} if impl == rival else {rival: round(2.5 / factor, 3)},
            **({"rate": 150.0 / factor, "rate_unit": "GFLOP/s", "ceiling": 204.0, "share_of_ceiling": 0.7351 / factor}),
            **(more if "-s" in impl and "two" not in impl else {}),
        )
        for impl, factor in times.items()
    ]


def all_files() -> dict[str, Any]:
    """A folder of results: one file of each kind."""
    accuracy = {"accuracy": 0.328149, "accuracy_std": 0.004519}
    narrow = [
        ("onnxruntime", "fp32", 96.0, 1.0),
        ("openvino", "bf16", 49.0, 0.99961),
        ("onnxruntime", "int8", 41.0, 0.999949),
    ]
    shapes = [(256, 16000, c) for c in (10, 100, 1000)] + [(256, k, 1000) for k in (1000, 64000)] + [(1, 16000, 1000)]
    rates = {"predict-folder": 19.4, "encoder-only": 20.1, "decode-only": 310.0, "obvious-script": 9.2}
    return {
        "cpu-encoder.json": [*encoder("demo-b64", 3, 81.237, **accuracy), *encoder("vit-b-16-b8", 8, 1519.4)],
        "cpu-precision.json": [
            timing("precision", "demo-b64-s3", impl, ms, precision=bits, min_cosine=cosine, **accuracy)
            for impl, bits, ms, cosine in narrow
        ],
        "cpu-scaling.json": [
            timing(
                "scaling-encoder",
                f"vit-b-32-b{batch}",
                impl,
                factor * 50 * batch**0.95,
                rate=batch / factor,
                rate_unit="images/s",
            )
            for batch in (1, 2, 8, 64)
            for impl, factor in (("onnxruntime-s8", 1.0), ("onnxruntime-two-pass-s8", 1.8))
        ]
        + [
            timing("scaling-score", f"q{q}-k{k}-d512-c{c}", impl, factor * q * k * 1e-5)
            for q, k, c in shapes
            for impl, factor in (("cpp/avx512", 1.0), ("eager-best", 1.5), ("papers-formula", 3.0))
        ],
        "cpu-pipeline.json": [
            timing(
                "pipeline",
                "vit-b-32-n500",
                impl,
                5e5 / rate,
                rate=rate,
                rate_unit="images/s",
                images=500,
                peak_memory_mb=612.34,
            )
            for impl, rate in rates.items()
        ],
        "cpu-cold-start.json": [
            timing("cold-start", "demo", "iosr-fast", 412.345, import_ms=99.0, torch_imported=False)
        ],
        "cpu-novel.json": [timing("novel", "x", "one", 9.99996)],
        "cpu-serving.json": serving(),
        "cpu-serving-peer.json": serving_peers(),
        "accuracy-demo.json": evaluation(),
        "aot-cuda.json": [
            {"kernel": "k", "arch": arch, "registers": 100 + arch, "spills": 0, "shared_bytes": 1024}
            for arch in (80, 90)
        ],
        "gpu-check-h200.json": gpu(),
    }


def serving_peers() -> dict[str, Any]:
    def row(server: str, rate: float) -> dict[str, Any]:
        runs = [{"load": load, "p50_ms": 100 * load, "p99_ms": 200 * load} for load in (0.5, 0.8)]
        spread = {"pictures_per_s": rate, "pictures_per_s_spread": [rate - 1, rate + 1], "p50_ms": 5e2, "p99_ms": 6e2}
        return {
            "server": server,
            "version": "1.2",
            "engine": "torch",
            "precision": "fp32",
            "lone_ms": 44.4,
            "runs": runs,
        } | spread

    return {
        "kind": "serving-peers",
        "device": "a test machine",
        "versions": {"python": "3.11"},
        "commit": "abc",
        "clients": 32,
        "servers": [row("ours", 60.0), row("infinity-emb", 15.0)],
        "ratios": {"ours": 4.125},
        "goals": [{"goal": "ours >= 3.3", "limit": 3.3, "measured": 4.125, "met": True}],
    }


def serving() -> dict[str, Any]:
    run = {"refused": 0, "errors": 0, "late": 0, "wrong": 0, "refusal_p99_ms": None}
    runs = [
        {**run, "load": 0.8, "ok": 16896, "p50_ms": 6.074, "p99_ms": 24.02},
        {**run, "load": 0.5, "ok": 10560, "p50_ms": 5.325, "p99_ms": 10.34},
    ]
    goals = [{"goal": "p99_ms <= 18.77 at 0.5", "limit": 18.77, "measured": 10.34, "met": True}]
    goals += [{"goal": "p99_ms <= 18.77 at 0.8", "limit": 18.77, "measured": 24.02, "met": False}]
    return {
        **MACHINE,
        "runs": runs,
        "capacity_rps": 352.0,
        "goals": goals,
        "memory": {"rss_mb": list(range(100)), "minutes": 10.0},
    }


def evaluation() -> list[dict[str, Any]]:
    shared = {"data": "demo", "classes": [443], **{key: MACHINE[key] for key in ("device", "versions", "commit")}}
    rows = [
        {
            "bench": "accuracy",
            "method": method,
            "reducer": "none",
            "shots": shots,
            "mean": mean + 0.01 * shots,
            "std": 0.00537,
            "se": None,
            "test_images": [1021],
            "seeds": [0, 1, 2],
            "tuned_on": "loo",
        }
        | shared
        for method, mean in (("tip-adapter", 0.12345), ("tip-adapter++", 0.17654))
        for shots in (1, 2)
    ]
    overlap = {
        "bench": "overlap",
        "embeddings": "plain",
        "overlap_area": 0.33118,
        "auroc": 0.909,
        "feature_variance": 0.633,
    }
    summary = {
        "bench": "summary",
        "data": "demo, other.npz",
        "reducer": "none",
        "at": [["demo", 1], ["demo", 2], ["other.npz", 1]],
    }
    summaries = [
        {"method": method, "mean": mean, "gap_mean": gap, "gap_worst": 2 * gap, "log_loss": 1.23456}
        | {"auto_ahead_mean": lead, "auto_ahead_worst": -lead}
        for method, mean, gap, lead in (("gda", 0.41234, 0.1, 0.05), ("auto", 0.41734, 0.03, 0.0))
    ]
    joint = {"bench": "joint", "method": "auto", "reducer": "auto", "shots": 4, "alone": 0.31234, "joint": 0.33234}
    labels = {"bench": "labels", "method": "auto", "map_std": 0.00712, "images": 400}
    joint |= {"gain": 2.0, "few_gain": -0.125, "refused": 0, "few_refused": 3}
    return [
        *rows,
        {**overlap, **shared, "images": 2793},
        *({**shared, **summary, **row} for row in summaries),
        {**joint, **shared},
        *({**labels, **shared, **row} for row in ({"shots": 2, "map": 0.1335}, {"shots": 8, "map": 0.2505})),
    ]


def gpu() -> dict[str, Any]:
    part = {
        "status": "done",
        "seconds": 12.3,
        "facts": {"agree": True},
        "tables": {"cases": [{"kernel": "cache", "worst_error": 1.2e-4, "ok": True}]},
    }
    return {
        "kind": "gpu-check",
        "trial": False,
        "complete": True,
        "device": "NVIDIA H200",
        "missing": ["tensorrt"],
        "failed": [],
        "skipped": ["tensorrt: tensorrt is not installed"],
        "commit": "0123456789ab",
        "parts": {"parity": part, "tensorrt": {"status": "skipped"}},
        "rows": [timing("gpu-encoder", "vit-b-16-b64", "fused", 3.21, device="NVIDIA H200", precision="fp16")],
    }
