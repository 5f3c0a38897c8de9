"""Options that several commands share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

# Options in sections of their own in the help.
RejectOption = partial(typer.Option, rich_help_panel="Images of none of the classes")
PartsOption = partial(typer.Option, rich_help_panel="Folder of parts")
RayOption = partial(typer.Option, rich_help_panel="Ray")
ReplicaOption = partial(typer.Option, rich_help_panel="Replicas")
BatchOption = partial(typer.Option, rich_help_panel="Batches")
LimitOption = partial(typer.Option, rich_help_panel="Limits")
TimeOption = partial(typer.Option, rich_help_panel="Time limits")

SavedClassifier = Annotated[
    Path, typer.Argument(metavar="CLASSIFIER", help="Folder that `iosr-fast fit` or Classifier.save wrote.")
]
Model = Annotated[
    str,
    typer.Option(help="demo, a model of open_clip (iosr-fast models), hf-hub:OWNER/NAME or local-dir:FOLDER."),
]
Pretrained = Annotated[
    str | None, typer.Option(help="Of a model of open_clip: the tag of its weights, which are downloaded, or a file.")
]
Adapter = Annotated[
    str, typer.Option(help="File of `iosr-fast train-adapter`, none, or auto: the demo's for the demo, else none.")
]
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read, and report them.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Address = Annotated[str | None, RayOption(help="Address of a running cluster; auto: the one on this machine.")]
# Of the servers.
MaxBatch = Annotated[
    int | None, BatchOption(help="Most images of a batch [default: 8 on a CPU; on a GPU as many as the engine takes].")
]
MaxWait = Annotated[float, BatchOption(help="Longest wait of a batch for more images, in milliseconds.")]
MaxImages = Annotated[int, LimitOption(help="Most images of a request.")]
Deadline = Annotated[int, TimeOption(help="Deadline of a request that names none, in milliseconds.")]
MaxDeadline = Annotated[int, TimeOption(help="Longest deadline that a request may name, in milliseconds.")]
