"""One geometry of each resize mode and filter, for odd and even sizes."""

from iosr_fast.images.geometry import Geometry

GEOMETRIES = [
    Geometry(64),
    Geometry(64, "shortest", "bilinear"),
    Geometry(64, "squash"),
    Geometry(63, "squash", "bilinear"),
    Geometry(64, "longest", fill=127),
    Geometry(63, "longest", "bilinear"),
]
