"""Sources of training pictures."""

from iosr_fast.offline.data.sources import FolderPictures, PictureSource, TensorPictures, demo_pictures

__all__ = ["FolderPictures", "PictureSource", "TensorPictures", "demo_pictures"]
