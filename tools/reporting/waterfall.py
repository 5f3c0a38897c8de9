"""One technique a bar, from the public way to the fastest: the time of a batch, and accuracy where a row has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.reporting import style
from tools.reporting.load import Results, Row
from tools.reporting.style import Found, Plot
from tools.reporting.text import short

CASE = re.compile(r"(?P<model>.+)-b(?P<batch>\d+)(?:-s(?P<first>\d+))?")
# Names of before there were several runtimes and places of the adapter.
OLD = {"onnxruntime": "onnxruntime", "two-pass": "onnxruntime-two-pass", "one-pass": "onnxruntime-one-pass"}
TWO_PASSES = {
    "eager-two-pass": "two passes, eager PyTorch",
    "torch-compile-two-pass": "two passes, torch.compile",
    "onnxruntime-two-pass": "two passes, ONNX Runtime",
    "openvino-two-pass": "two passes, OpenVINO",
}
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "tensorrt": "TensorRT"}
MODELS = {"demo": "the demo's CLIP", "vit-b-16": "ViT-B/16", "vit-b-32": "ViT-B/32", "vit-l-14": "ViT-L/14"}


@dataclass(frozen=True)
class Step:
    label: str
    found: Found
    colour: str

    @property
    def ms(self) -> float:
        return float(self.found.row["runtime_ms"])


def parse_case(case: str) -> tuple[str, int, int | None] | None:
    """vit-b-16-b8-s8 is ViT-B/16, batch 8, adapters from block 8 on; None for a case of another form."""
    made = CASE.fullmatch(case)
    if made is None:
        return None
    return made["model"], int(made["batch"]), None if made["first"] is None else int(made["first"])


def parse_impl(row: Row) -> tuple[str, int | None]:
    """onnxruntime-two-pass-s8 is (onnxruntime-two-pass, 8); an old name takes its block from the case."""
    name, _, last = str(row["impl"]).rpartition("-s")
    if name and last.isdigit():
        return name, int(last)
    case = parse_case(str(row["case"]))
    plain = str(row["impl"])
    return OLD.get(plain, plain), case[2] if case is not None else None


def model_name(model: str) -> str:
    return MODELS.get(model, model)


def runtime_label(row: Row) -> str:
    """onnxruntime-s8:int8, onnxruntime-int8 or onnxruntime: ONNX Runtime; the precision is told by the row.

    A name that says more than runtime, block and precision stays as it is.
    """
    impl = str(row["impl"])
    made = re.fullmatch(rf"(\w+?)(-s\d+)?([:-]{re.escape(str(row.get('precision')))})?", impl)
    return RUNTIMES.get(made[1], impl) if made is not None else impl


def fused_steps(found: Sequence[Found]) -> tuple[list[Step], Found | None]:
    """The steps that rows of one encoder case allow, and the row of one plain pass."""
    by_name = {parse_impl(one.row): one for one in found}
    places = [first for name, first in by_name if name in TWO_PASSES and first is not None]
    places = places or [first for name, first in by_name if name in RUNTIMES and first is not None]
    late = max(places, default=None)
    made = [
        Step(label, by_name[name, late], style.GREY if name != "eager-two-pass" else style.RIVAL)
        for name, label in TWO_PASSES.items()
        if (name, late) in by_name
    ]
    for name in ("onnxruntime", "openvino"):
        for first in sorted({0, late} - {None}, key=int):  # type: ignore[arg-type]
            where = "in all blocks" if first == 0 else f"from block {first}"
            if (name, first) in by_name and (name == "onnxruntime" or first == late):
                made.append(Step(f"fused, adapters {where}, {RUNTIMES[name]}", by_name[name, first], style.OURS))
    compiled = {f"{runtime}-one-pass" for runtime in RUNTIMES}
    one = [one for (name, _), one in sorted(by_name.items(), key=repr) if name in compiled]
    return made, min(one, key=lambda one: float(one.row["runtime_ms"]), default=None)


def waterfalls(results: Sequence[Results]) -> list[Plot]:
    """A figure for each model, batch and machine with at least two steps; the demo first."""
    cases: dict[tuple[str, int, str], tuple[list[Found], list[Found]]] = {}
    for bench in ("encoder", "precision"):
        for one in style.rows_of(results, bench):
            parsed = parse_case(str(one.row["case"]))
            if parsed is not None:
                key = (parsed[0], parsed[1], style.machine(one.row))
                cases.setdefault(key, ([], []))[bench == "precision"].append(one)
    made: list[Plot] = []
    for model, batch, where in sorted(cases, key=lambda key: (key[0] != "demo", key)):
        encoder, precision = cases[model, batch, where]
        steps, one_pass = fused_steps(encoder)
        if len(steps) < 2:
            continue
        narrow = sorted(precision, key=lambda one: -one.row["runtime_ms"])
        steps += [
            Step(f"fused, {runtime_label(one.row)}, {one.row.get('precision')}", one, style.SECOND) for one in narrow
        ]
        name = style.free_name(f"waterfall-{model}", made)
        told = (
            f"Both embeddings of {batch} pictures, {model_name(model)}, {where}: ms a batch, and how often that goes "
            "into the first bar. Orange: the public way; grey: the same two passes, compiled; blue: ours in fp32"
        )
        if narrow:
            told += "; green: the run of the precision benchmark, whose own fp32 shows how far the two runs agree"
        told += (
            "; dashed: the fastest compiled plain pass, which gives no adapted embedding."
            if one_pass is not None
            else "."
        )
        if model != "demo":
            told += " Weights are random: they change no speed, and there is no accuracy to tell."
        used = [step.found for step in steps] + ([one_pass] if one_pass is not None else [])
        title = f"What each step gives: {model_name(model)}, batch {batch}"
        draw = partial(draw_waterfall, steps, one_pass, title)
        made.append(Plot(name, title, told, style.sources(used), draw))
    return made


def draw_waterfall(steps: Sequence[Step], one_pass: Found | None, title: str, path: Path) -> None:
    accurate = any(step.found.row.get("accuracy") is not None for step in steps)
    made = style.figure(style.WIDTH, 0.9 + 0.36 * len(steps))
    grid = made.subplots(1, 2 if accurate else 1, sharey=True, squeeze=False, width_ratios=[3, 1][: 1 + accurate])
    axis = grid[0][0]
    first = steps[0].ms
    labels = [f"{short(step.ms)} ms" + (f"   {first / step.ms:.2f}x" if i else "") for i, step in enumerate(steps)]
    style.bars(
        axis, [step.label for step in steps], [step.ms for step in steps], [step.colour for step in steps], labels
    )
    axis.set_xlabel("ms a batch", fontsize=9)
    if one_pass is not None:
        axis.axvline(one_pass.row["runtime_ms"], color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2.5)
        axis.annotate(
            "one plain pass",
            (one_pass.row["runtime_ms"], -0.55),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=8.5,
        )
    if accurate:
        beside = grid[0][1]
        for y, step in enumerate(steps):
            value = step.found.row.get("accuracy")
            if value is None:
                continue
            error = step.found.row.get("accuracy_std")
            beside.errorbar(
                100 * value, y, xerr=None if error is None else 100 * error, fmt="o", color=step.colour, markersize=5,
                elinewidth=1.2, capsize=2,
            )  # fmt: skip
            beside.annotate(
                f"{100 * value:.1f}",
                (100 * value, y),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        beside.margins(x=0.35)
        beside.set_xlabel("accuracy in %", fontsize=9)
        style.clean(beside, "x")
        beside.tick_params(axis="y", length=0, labelleft=False)
    style.save(made, path, title)
