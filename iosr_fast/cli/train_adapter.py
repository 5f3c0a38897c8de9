"""The command `iosr-fast train-adapter`."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from safetensors import SafetensorError

from iosr_fast.cli.options import Model, Nested, Pretrained, option
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.outputs import check_writable
from iosr_fast.utils.csv_text import read_rows
from iosr_fast.utils.require import require_installed

# DINO takes its random crops from pictures this much larger than the encoder's own size.
DINO_MARGIN = 10 / 7

Preset = Literal["fast", "paper", "demo"]
TrainingObjective = Literal["supervised", "dino"]


def train_adapter(
    out: Annotated[Path, option("Adapter file to write (.safetensors).")],
    model: Model = "demo",
    pretrained: Pretrained = None,
    data: Annotated[str, option("demo, a folder of class folders, or a .csv of path and label.")] = "demo",
    nested: Nested = False,
    objective: Annotated[TrainingObjective, option("Train with labels, or without by DINO.")] = "supervised",
    preset: Annotated[Preset | None, option("Place, width and training [fast; demo for --data demo].")] = None,
    first_adapted_block: Annotated[int | None, option("First block [last third; paper: all; demo: half].")] = None,
    bottleneck: Annotated[int | None, option("Width of the adapter [256; paper 64].")] = None,
    epochs: Annotated[int | None, option("Passes over the images [1; demo 32; dino 10].")] = None,
    batch: Annotated[int | None, option("Images of a step, of all processes [128; dino 120].")] = None,
    learning_rate: Annotated[float | None, option("[8e-3; dino 8e-4 for a batch of 256]")] = None,
    workers: Annotated[int, option("Processes that decode images.")] = 2,
    accelerator: Annotated[str, option("auto, cpu or cuda.")] = "auto",
    settings: Annotated[Path | None, option("JSON file of all other settings, as OUT.training/settings.json.")] = None,
    seed: Annotated[int | None, option("Seed of all random choices [0].")] = None,
) -> None:
    """Train the bottleneck adapter of a CLIP, with labels or by DINO.

    The preset fast puts wide adapters into the last third of the blocks: both embeddings then cost little more than
    one. The preset paper is the paper's, narrow adapters in all blocks, at the cost of two. The preset demo is that of
    the shipped adapter. The same command resumes an interrupted run from its last checkpoint, in OUT.training.

    Examples; torchrun starts a process for each GPU:

    \b
    iosr-fast train-adapter --model ViT-B-16 --pretrained openai --data DIR \\
        --out adapter.safetensors
    torchrun --nproc-per-node 4 -m iosr_fast train-adapter ...
    """
    training = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    given = {"first_adapted_block": first_adapted_block, "bottleneck": bottleneck}
    require_installed("torch", "train")
    from iosr_fast.backbones.adapter import init_adapter
    from iosr_fast.backbones.fuse import check_adaptable
    from iosr_fast.backbones.load import load_clip, shapes_of
    from iosr_fast.backbones.models import check_model
    from iosr_fast.backbones.vision_tower import vision_tower
    from iosr_fast.training.config import PRESETS, read_settings
    from iosr_fast.training.pictures import demo_sources, file_sources
    from iosr_fast.training.processes import make_fabric

    preset = preset or ("demo" if data == "demo" else "fast")
    check_out(out)
    check_adaptable(shapes_of(model, check_model(model, pretrained)), model)
    in_file = {} if settings is None else read_settings(settings)
    paths, labels = ([], []) if data == "demo" else read_data(Path(data), nested)
    clip = load_clip(model, pretrained)

    used = PRESETS[preset, objective].settings(len(vision_tower(clip.model.visual, clip.name).blocks))
    used = used.changed(in_file, str(settings)).changed({**of_given(given), "training": of_given(training)}, "options")
    config, geometry = used.training, clip.geometry
    if (config.dino is None) != (objective == "supervised"):
        raise IosrFastError(
            f"expected settings of --objective {objective}, got those of another objective: training.dino"
        )
    adapter = init_adapter(clip, used.first_adapted_block, used.bottleneck, used.scale, seed=config.seed)
    if config.dino is not None and data != "demo":
        geometry = replace(geometry, size=round(clip.image_size * DINO_MARGIN))

    geometries = geometry, clip.geometry
    if data == "demo":
        sources = demo_sources(*geometries)
    else:
        sources = file_sources(paths, labels, *geometries, used.held_out, config.seed, workers, used.skip_missing)
    run(out, clip, adapter, used, sources, make_fabric(config.precision, accelerator))


def of_given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None: 0 is passed on, to be refused where it is invalid."""
    return {name: value for name, value in options.items() if value is not None}


def read_data(data: Path, nested: bool = False) -> tuple[list[Path], list[str]]:
    """The pictures and class names of a folder of class folders, or of a CSV of path and label (or of path alone)."""
    from iosr_fast.head.labelled_images import labelled_images

    if data.suffix.lower() == ".csv" and data.is_file():
        columns, rows = read_rows(data)
        if "path" in columns and not {"label", "labels"} & set(columns):
            listed = [data.parent / row["path"] for row in rows if row["path"]]
            return listed, ["unlabelled"] * len(listed)
    paths, names, *_ = labelled_images(data, nested=nested)
    if any(isinstance(name, frozenset) for name in names):
        raise IosrFastError(f"expected one label a picture in {data}, got the column labels; add a column label")
    return paths, names


def check_out(out: Path) -> None:
    """Raise ValueError or OSError if the trained adapter couldn't be written, or would replace a file that is none."""
    from iosr_fast.backbones.adapter import load_adapter

    if out.is_dir():
        raise IosrFastError(f"expected --out as the file to write, got the folder {out}; add a name to it")
    if out.exists():
        try:
            load_adapter(out)
        except Exception as error:
            raise IosrFastError(f"{out} exists and is no adapter; choose another name") from error
    folder = Path(os.path.realpath(training_folder(out)))
    if folder.is_file():
        raise FileExistsError(f"expected room for the folder {folder}, got a file of that name; move it")
    check_writable(next(each for each in (folder, *folder.parents) if each.exists()), out)


def training_folder(out: Path) -> Path:
    return out.with_name(out.name + ".training")


@contextmanager
def begun_training(folder: Path, settings: Any) -> Iterator[None]:
    """The training's folder with its settings. An error before the first checkpoint removes a folder that is new."""
    import msgspec

    from iosr_fast.sealed.files import new_file

    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    try:
        if not checkpoints.exists():  # else the settings are those of the checkpoints, which may be of another training
            with new_file(folder / "settings.json") as temporary:
                temporary.write_bytes(msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
        yield
    except Exception:
        if missing and not checkpoints.exists():
            shutil.rmtree(folder)
            with suppress(OSError):  # other files have come to its parents
                for parent in missing[1:]:
                    parent.rmdir()
        raise


def run(out: Path, clip: Any, adapter: Any, settings: Any, sources: Any, fabric: Any) -> None:
    """Train, with the bar, and write the settings and `out`."""
    from iosr_fast.backbones.adapter import save_adapter
    from iosr_fast.training import train as training
    from iosr_fast.training.progress import TrainingBar

    folder, train, config = training_folder(out), sources.train, settings.training
    bar = TrainingBar(config, len(train.labels), shown=fabric.is_global_zero)
    bar.say(
        f"{len(train.labels)} pictures of {len(train.class_names)} classes, {config.epochs} epochs, "
        f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {fabric.device.type}, logs in {folder}/log"
    )
    for note in sources.notes:
        bar.say(note)
    if out.exists():
        bar.say(f"{out} exists and is replaced when this training ends")
    if config.cached_views:
        bar.say(
            "an epoch whose view is not cached yet begins with the frozen blocks, on all pictures: no step ends then"
        )
    options = {"checkpoint_minutes": settings.checkpoint_minutes, "tensorboard": settings.tensorboard, "fabric": fabric}
    measured = {"held_out": sources.held_out, "report_epoch": bar.epoch}
    try:
        with begun_training(folder, settings) if fabric.is_global_zero else nullcontext(), bar:
            trained = training.train_adapter(clip, adapter, train, config, folder, bar.step, **measured, **options)
    except KeyboardInterrupt as stopped:
        message = f"{stopped}: the same command resumes from there"
        bar.say(message if str(stopped) else "stopped at once: the same command resumes from the last checkpoint")
        sys.stdout.flush()
        for process in multiprocessing.active_children():  # decoding; they would outlive os._exit
            process.kill()
        os._exit(130)  # torchrun's other processes stop as well: nothing to wait for
    if not fabric.is_global_zero:
        return
    try:
        save_adapter(trained, out)
    except (OSError, SafetensorError) as error:  # nothing is lost, because the last checkpoint holds the same
        raise OSError(f"can't write {out} ({error}); fix that, and the same command writes it at once") from error
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    bar.say(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {bar.seconds:.0f} s")
