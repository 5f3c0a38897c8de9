"""Sources of training pictures."""

from iosr_fast.training.data.open_images import OpenImagesPictures
from iosr_fast.training.data.shards import ShardPictures
from iosr_fast.training.data.sources import (
    FilePictures,
    FolderPictures,
    PictureSource,
    SubsetPictures,
    TensorPictures,
    demo_pictures,
    split,
)

__all__ = [
    "FilePictures",
    "FolderPictures",
    "OpenImagesPictures",
    "PictureSource",
    "ShardPictures",
    "SubsetPictures",
    "TensorPictures",
    "demo_pictures",
    "split",
]
