"""The command `iosr-fast train-adapter`."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from safetensors import SafetensorError

from iosr_fast.cli.options import Model, Pretrained, Seed, option
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

# DINO takes its random crops from pictures this much larger than the encoder's own size.
DINO_MARGIN = 10 / 7

OfPictures = partial(option, rich_help_panel="Pictures")
OfAdapter = partial(option, rich_help_panel="Adapter")
OfTraining = partial(option, rich_help_panel="Training")
OfDino = partial(option, rich_help_panel="DINO")
Share = tuple[float, float]
Preset = Literal["fast", "paper", "demo"]
Objective = Literal["supervised", "dino"]


def train_adapter(
    out: Annotated[Path, option("Adapter file to write (.safetensors).")],
    model: Model = "demo",
    pretrained: Pretrained = None,
    data: Annotated[str, OfPictures("demo, a folder of class folders, or a .csv of path and label.")] = "demo",
    skip_missing: Annotated[bool, OfPictures("Leave out images without a file.", "--skip-missing")] = False,
    held_out: Annotated[float, OfPictures("Share of each class to measure on each epoch.", min=0, max=0.5)] = 0.02,
    workers: Annotated[int, OfPictures("Processes that decode images.")] = 2,
    preset: Annotated[Preset | None, OfAdapter("Place, width and training [fast; demo for --data demo].")] = None,
    first_adapted_block: Annotated[int | None, OfAdapter("First block [last third; paper: all; demo: half].")] = None,
    bottleneck: Annotated[int | None, OfAdapter("Width of the adapter [256; paper 64].")] = None,
    scale: Annotated[float | None, OfAdapter("Factor of its output [0.1; paper, supervised 0.03].")] = None,
    objective: Annotated[Objective, OfTraining("Train with labels, or without by DINO.")] = "supervised",
    epochs: Annotated[int | None, OfTraining("Passes over the images [1; demo 32; dino 10].")] = None,
    batch: Annotated[int | None, OfTraining("Images of a step, of all processes [128; dino 120].")] = None,
    accumulate: Annotated[int, OfTraining("Micro-batches into which a process splits its images.")] = 1,
    learning_rate: Annotated[float | None, OfTraining("[8e-3; dino 8e-4 for a batch of 256]")] = None,
    schedule: Annotated[str | None, OfTraining("constant or cosine [cosine; paper constant].")] = None,
    augment: Annotated[bool | None, OfTraining("Small affine and colour changes [no; demo yes].")] = None,
    normalise: Annotated[bool, OfTraining("Apply CLIP's mean and deviation; the papers' code does not.")] = True,
    cached_views: Annotated[int, OfTraining("Supervised: views whose activations are cached on disk.")] = 0,
    precision: Annotated[str, OfTraining("32-true, bf16-mixed or 16-mixed.")] = "32-true",
    accelerator: Annotated[str, OfTraining("auto, cpu or cuda.")] = "auto",
    checkpoint_minutes: Annotated[float, OfTraining("Minutes between checkpoints; 0: after epochs.", min=0)] = 10,
    tensorboard: Annotated[bool, OfTraining("Write TensorBoard events, too.", "--tensorboard")] = False,
    dino_out: Annotated[int | None, OfDino("Prototypes of the projection head [65536; demo 2048].")] = None,
    dino_width: Annotated[int, OfDino("Width of the vectors that are compared with prototypes.")] = 256,
    dino_momentum: Annotated[float | None, OfDino("Momentum of the teacher [0.9998; demo 0.99].")] = None,
    local_crops: Annotated[int, OfDino("Small crops of each image.")] = 10,
    global_scale: Annotated[Share, OfDino("Share of the image in a global crop, from and to.")] = (0.25, 1.0),
    local_scale: Annotated[Share, OfDino("Share of the image in a small crop, from and to.")] = (0.05, 0.25),
    train_head: Annotated[bool, OfDino("Train the projection head, too; the papers' code freezes it.")] = True,
    seed: Seed = 0,
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
    given = {**locals()}
    require_installed("torch", "train")
    from iosr_fast.clip.adapter import init_adapter
    from iosr_fast.clip.load import load_clip
    from iosr_fast.clip.models import check_adaptable, check_model
    from iosr_fast.clip.vision_tower import vision_tower
    from iosr_fast.training.adapted_encoder import AdaptedEncoder
    from iosr_fast.training.config import PRESETS
    from iosr_fast.training.objectives import local_size
    from iosr_fast.training.pictures import demo_sources, file_sources
    from iosr_fast.training.processes import make_fabric

    preset = preset or ("demo" if data == "demo" else "fast")
    chosen = PRESETS[preset, objective]
    check_out(out)
    check_model(model, pretrained)
    check_adaptable(model)
    paths, labels = ([], []) if data == "demo" else read_data(Path(data))
    clip = load_clip(model, pretrained)

    blocks = len(vision_tower(clip.model.visual, clip.name).blocks)
    first = chosen.first_adapted_block(blocks) if first_adapted_block is None else first_adapted_block
    width = chosen.bottleneck if bottleneck is None else bottleneck
    adapter = init_adapter(clip, first, width, chosen.scale if scale is None else scale, seed=seed)

    names = ("epochs", "batch", "learning_rate", "schedule", "augment", "accumulate", "normalise", "cached_views")
    config = with_given(chosen.training, **{name: given[name] for name in (*names, "precision", "seed")})
    geometry = clip.geometry
    if config.dino is not None:
        scales = {"global_scale": global_scale, "local_scale": local_scale, "local_crops": local_crops}
        head = {"out_dim": dino_out, "head_bottleneck": dino_width, "momentum": dino_momentum, "train_head": train_head}
        dino = with_given(config.dino, **scales, **head)
        config = replace(config, dino=dino)
        local_size(AdaptedEncoder(clip, first), dino)
        if data != "demo":
            geometry = replace(geometry, size=round(clip.image_size * DINO_MARGIN))

    geometries = geometry, clip.geometry
    if data == "demo":
        sources = demo_sources(*geometries)
    else:
        sources = file_sources(paths, labels, *geometries, held_out, seed, workers, skip_missing)
    run(out, clip, adapter, config, sources, make_fabric(precision, accelerator), checkpoint_minutes, tensorboard)


def with_given(config: Any, **options: Any) -> Any:
    """`config` with the options that are not None: 0 and False are passed on, to be refused where they are invalid."""
    return replace(config, **{name: value for name, value in options.items() if value is not None})


def read_data(data: Path) -> tuple[list[Path], list[str]]:
    """The pictures and class names of a folder of class folders, or of a CSV of path and label (or of path alone)."""
    from iosr_fast.head.labelled_images import labelled_images
    from iosr_fast.training.pictures import unlabelled_list

    if data.suffix.lower() == ".csv" and data.is_file() and (listed := unlabelled_list(data)) is not None:
        return listed, ["unlabelled"] * len(listed)
    paths, names, *_ = labelled_images(data)
    if any(isinstance(name, frozenset) for name in names):
        raise IosrFastError(f"expected one label a picture in {data}, got the column labels; add a column label")
    return paths, names


def check_out(out: Path) -> None:
    """Raise ValueError or OSError if the trained adapter couldn't be written, or would replace a file that is none."""
    from iosr_fast.clip.adapter import load_adapter

    if out.is_dir():
        raise IosrFastError(f"expected --out as the file to write, got the folder {out}; add a name to it")
    if out.exists():
        try:
            load_adapter(out)
        except Exception as error:
            raise IosrFastError(f"{out} exists and is no adapter; choose another name") from error
    if training_folder(out).is_file():
        raise FileExistsError(f"expected room for the folder {training_folder(out)}, got a file of that name; move it")
    training_folder(out).mkdir(parents=True, exist_ok=True)


def training_folder(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def run(
    out: Path, clip: Any, adapter: Any, config: Any, sources: Any, fabric: Any, minutes: float, tensorboard: bool
) -> None:
    """Train, with the bar, and write `out`. `minutes` lie between checkpoints."""
    from iosr_fast.clip.adapter import save_adapter
    from iosr_fast.training import train as training
    from iosr_fast.training.progress import TrainingBar

    folder, train = training_folder(out), sources.train
    bar = TrainingBar(config, len(train.labels), shown=fabric.is_global_zero)
    bar.say(
        f"{len(train.labels)} pictures of {len(train.class_names)} classes, {config.epochs} epochs, "
        f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {fabric.device.type}, logs in {folder}/log"
    )
    for note in sources.notes + ((f"{out} exists and is replaced when this training ends",) if out.exists() else ()):
        bar.say(note)
    options = {"checkpoint_minutes": minutes, "tensorboard": tensorboard, "fabric": fabric}
    measured = {"held_out": sources.held_out, "report_epoch": bar.epoch}
    try:
        with bar:
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
    for name in ("checkpoints", "activations"):
        shutil.rmtree(folder / name, ignore_errors=True)
    bar.say(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {bar.seconds:.0f} s")
