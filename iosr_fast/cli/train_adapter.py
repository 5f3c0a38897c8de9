"""The command `iosr-fast train-adapter`."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from safetensors import SafetensorError

from iosr_fast.cli.options import Model, Seed
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

if TYPE_CHECKING:
    from iosr_fast.training.sources import Sources
    from iosr_fast.training.train_config import DinoConfig, TrainConfig

_Config = TypeVar("_Config", "TrainConfig", "DinoConfig")

# DINO takes its random crops from pictures this much larger than the encoder's own size.
DINO_MARGIN = 10 / 7


def train_adapter(
    out: Annotated[Path, typer.Option(help="Adapter file to write (.safetensors).")],
    model: Model = "demo",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's tag of the weights, a file, or none: random. Not for the demo.")
    ] = None,
    objective: Annotated[
        Literal["supervised", "dino"], typer.Option(help="Train with labels, or without by DINO.")
    ] = "supervised",
    data: Annotated[
        str, typer.Option(help="demo, a folder with one folder of images for each class, .tar shards, or open-images.")
    ] = "demo",
    csv: Annotated[
        Path | None, typer.Option(help="For open-images: the file of `iosr-fast open-images-subset`.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="For open-images: the folder that holds ImageID.jpg.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="For open-images: leave out images without a file.")
    ] = False,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of each class to measure on after each epoch.")
    ] = 0.02,
    preset: Annotated[
        Literal["fast", "paper", "demo"] | None,
        typer.Option(help="Place, width and training of the adapter [default: fast; demo for --data demo]."),
    ] = None,
    first_adapted_block: Annotated[
        int | None, typer.Option(help="First block with an adapter [fast: last third; paper: all; demo: last half].")
    ] = None,
    bottleneck: Annotated[int | None, typer.Option(help="Width of the adapter [256; paper 64].")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of the adapter's output [0.1; paper, supervised 0.03].")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images [1; demo 32; dino 10].")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of a step, of all processes together [128; dino 120].")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Micro-batches into which a process splits its images.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="[8e-3; dino 8e-4 for a batch of 256]")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant or cosine [cosine; paper, supervised constant].")
    ] = None,
    augment: Annotated[
        bool | None, typer.Option(help="Supervised: small affine and colour changes [no; demo yes].")
    ] = None,
    normalise: Annotated[
        bool, typer.Option(help="Apply CLIP's mean and standard deviation in training; the papers' code does not.")
    ] = True,
    cached_views: Annotated[
        int, typer.Option(help="Supervised: views whose activations before the adapter are cached on disk.")
    ] = 0,
    cache_precision: Annotated[str, typer.Option(help="Of the cached activations: fp16 or bf16.")] = "fp16",
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dino_out: Annotated[
        int | None, typer.Option(help="DINO: prototypes of the projection head [65536; demo 2048].")
    ] = None,
    dino_momentum: Annotated[
        float | None, typer.Option(help="DINO: momentum of the teacher [0.9998; demo 0.99].")
    ] = None,
    dino_width: Annotated[
        int, typer.Option(min=1, help="DINO: width of the vectors that are compared with prototypes.")
    ] = 256,
    local_crops: Annotated[int, typer.Option(min=0, help="DINO: small crops of each image.")] = 10,
    global_scale: Annotated[
        tuple[float, float], typer.Option(help="DINO: share of the image in a global crop, from and to.")
    ] = (0.25, 1.0),
    local_scale: Annotated[
        tuple[float, float], typer.Option(help="DINO: share of the image in a small crop, from and to.")
    ] = (0.05, 0.25),
    train_head: Annotated[
        bool, typer.Option(help="DINO: train the projection head, too; the papers' code freezes it.")
    ] = True,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: by time only.")] = 0,
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0, help="Minutes between checkpoints; 0: at the end of epochs only.")
    ] = 10,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events beside the CSV files.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
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
    require_installed("torch", "train")
    from iosr_fast.clip.adapter import init_adapter
    from iosr_fast.clip.load import load_clip
    from iosr_fast.clip.models import check_adaptable, check_model
    from iosr_fast.clip.vision_tower import vision_tower
    from iosr_fast.training.adapted_encoder import AdaptedEncoder
    from iosr_fast.training.dino import local_size
    from iosr_fast.training.presets import PRESETS
    from iosr_fast.training.processes import make_fabric
    from iosr_fast.training.sources import open_sources

    demo, dino = data == "demo", objective == "dino"
    chosen = PRESETS[preset or ("demo" if demo else "fast"), objective]
    check_out(out)
    check_model(model, pretrained)
    check_adaptable(model)
    clip = load_clip(model, pretrained)
    blocks = len(vision_tower(clip.model.visual, clip.name).blocks)
    adapter = init_adapter(
        clip,
        first_adapted_block=or_default(first_adapted_block, chosen.first_adapted_block(blocks)),
        bottleneck=or_default(bottleneck, chosen.bottleneck),
        scale=or_default(scale, chosen.scale),
        seed=seed,
    )
    config = chosen.training
    if config.dino is not None:
        head = with_given(
            config.dino,
            out_dim=dino_out,
            momentum=dino_momentum,
            head_bottleneck=dino_width,
            local_crops=local_crops,
            global_scale=global_scale,
            local_scale=local_scale,
            train_head=train_head,
        )
        config = replace(config, dino=head)
        local_size(AdaptedEncoder(clip, adapter.config.first_adapted_block), head)
    config = with_given(
        config,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        schedule=schedule,
        augment=augment,
        accumulate=accumulate,
        normalise=normalise,
        cache_precision=cache_precision,
        precision=precision,
        cached_views=cached_views,
        seed=seed,
    )
    size = round(clip.image_size * DINO_MARGIN) if dino and not demo else clip.image_size
    geometry = replace(clip.geometry, size=size)
    sources = open_sources(data, geometry, clip.geometry, held_out, workers, seed, csv, images, skip_missing)
    fabric = make_fabric(precision, accelerator)
    checkpoints = {"checkpoint_every": checkpoint_every, "checkpoint_minutes": checkpoint_minutes}
    run(out, clip, adapter, config, sources, fabric, checkpoints, tensorboard)


def or_default(value: Any, default: Any) -> Any:
    """The default for None only: 0 and False are passed on, to be refused where they are invalid."""
    return default if value is None else value


def with_given(config: _Config, **options: Any) -> _Config:
    """`config` with the options that are not None."""
    return replace(config, **{name: value for name, value in options.items() if value is not None})


def training_folder(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def check_out(out: Path) -> None:
    """Raise ValueError or OSError if the trained adapter couldn't be written, or would replace a file that is none."""
    from iosr_fast.clip.adapter import load_adapter

    if out.is_dir():
        raise IosrFastError(f"expected --out as the file to write, got the folder {out}; add a name to it")
    if out.exists():
        try:
            load_adapter(out)
        except Exception as error:
            raise IosrFastError(
                f"{out} exists and is no adapter, which training would replace; choose another name"
            ) from error
    if training_folder(out).is_file():
        raise FileExistsError(f"expected room for the folder {training_folder(out)}, got a file of that name; move it")
    training_folder(out).mkdir(parents=True, exist_ok=True)
    for folder in (out.parent, training_folder(out)):
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"expected a folder to write {out.name} to, got {folder}, which can't be written to")


def run(
    out: Path,
    clip: Any,
    adapter: Any,
    config: TrainConfig,
    sources: Sources,
    fabric: Any,
    checkpoints: dict[str, Any],
    tensorboard: bool,
) -> None:
    """Train, with the bar, and write `out`. `checkpoints` are arguments of `train_adapter`."""
    from iosr_fast.training import train as training
    from iosr_fast.training.progress import TrainingBar

    folder = training_folder(out)
    bar = TrainingBar(config, len(sources.train.labels), shown=fabric.is_global_zero)
    bar.say(
        f"{len(sources.train.labels)} pictures of {len(sources.train.class_names)} classes, {config.epochs} epochs, "
        f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {fabric.device.type}, logs in {folder}"
    )
    if out.exists():
        bar.say(f"{out} exists and is replaced when this training ends")
    for note in sources.notes:
        bar.say(note)
    try:
        with bar:
            trained = training.train_adapter(
                clip,
                adapter,
                sources.train,
                config,
                folder,
                bar.step,
                held_out=sources.held_out,
                report_epoch=bar.epoch,
                tensorboard=tensorboard,
                fabric=fabric,
                **checkpoints,
            )
        if fabric.is_global_zero:
            write(trained, out)
    except KeyboardInterrupt as stopped:
        message = f"{stopped}: the same command resumes from there"
        bar.say(message if str(stopped) else "stopped at once: the same command resumes from the last checkpoint")
        sys.stdout.flush()
        os._exit(130)  # torchrun's other processes stop as well: nothing to wait for
    if fabric.is_global_zero:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "activations", ignore_errors=True)
        bar.say(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {bar.seconds:.0f} s")


def write(trained: Any, out: Path) -> None:
    """Raises OSError if the disk is full; nothing is lost, because the last checkpoint holds the same."""
    from iosr_fast.clip.adapter import save_adapter

    try:
        save_adapter(trained, out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"can't write {out} ({error}); fix that, and the same command writes it at once") from error
