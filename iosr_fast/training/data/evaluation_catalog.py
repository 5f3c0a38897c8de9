"""The evaluation sets of the field as a table: what to download, where to put it, and how it is read.

Folders are CoOp's (https://github.com/KaiyangZhou/CoOp, DATASETS.md), torchvision's where a layout says so. Counts of
images are those of CoOp's paper (arXiv 2109.01134) for its splits, and for split_alexey_*.json what the files hold that
come with the public code of arXiv 2409.11338 (folder files/).
"""

from __future__ import annotations

from dataclasses import dataclass

from iosr_fast.training.data import evaluation_readers as readers
from iosr_fast.training.data.evaluation_files import Layout, Need, split_json
from iosr_fast.training.data.evaluation_official import (
    AIRCRAFT_OFFICIAL,
    CARS,
    CARS_OFFICIAL,
    CLASSNAMES,
    CUB,
    CUB_OFFICIAL,
    DOGS,
    DOGS_OFFICIAL,
    DRIVE,
    DTD_OFFICIAL,
    FLOWERS_OFFICIAL,
    FOOD_OFFICIAL,
    IMAGENET_OFFICIAL,
    OXFORD,
    PETS_OFFICIAL,
    PLANTDOC_OFFICIAL,
    PLANTDOC_URL,
    SUN,
    SUN_OFFICIAL,
    UCF_FRAMES,
    UCF_OFFICIAL,
)


@dataclass(frozen=True)
class Download:
    """A set: its title, its number of classes, and the layouts in which it is read, the first that is there."""

    name: str
    title: str
    classes: int
    layouts: tuple[Layout, ...]
    note: str = ""


PAPER = "https://arxiv.org/abs/2409.11338, its public code, files/"


def _coop(
    file: str, file_url: str, images: str | tuple[str, ...], images_url: str, counts: tuple[int, int, int], *more: Need
) -> Layout:
    title = "the paper's split" if "alexey" in file else "CoOp's split"
    needs = (Need((file,), file_url), Need((images,) if isinstance(images, str) else images, images_url), *more)
    return Layout(title, needs, dict(zip(("train", "val", "test"), counts, strict=True)), split_json)


def _wnid_names(folder: str) -> Need:
    return Need((f"{folder}/classnames.txt", "imagenet/classnames.txt"), CLASSNAMES)


def _shift(name: str, title: str, classes: int, folders: tuple[str, ...], url: str, test: int, note: str) -> Download:
    read = readers.imagenet_v2 if name == "imagenet_v2" else readers.imagenet_part
    needs = (_wnid_names(folders[0].split("/")[0]), Need(folders, url))
    return Download(name, title, classes, (Layout("all images", needs, {"test": test}, read),), note)


CATALOG = {
    entry.name: entry
    for entry in (
        Download(
            "caltech101",
            "Caltech101",
            100,
            (
                _coop(
                    "caltech-101/split_zhou_Caltech101.json",
                    f"{DRIVE}1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
                    "caltech-101/101_ObjectCategories",
                    "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                    (4128, 1649, 2465),
                ),
            ),
            "no official split; background and Faces_easy are left out",
        ),
        Download(
            "dtd",
            "DTD",
            47,
            (
                _coop(
                    "dtd/split_zhou_DescribableTextures.json",
                    f"{DRIVE}1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
                    "dtd/images",
                    f"{OXFORD}dtd/download/dtd-r1.0.1.tar.gz",
                    (2820, 1128, 1692),
                ),
                DTD_OFFICIAL,
            ),
        ),
        Download(
            "eurosat",
            "EuroSAT",
            10,
            (
                _coop(
                    "eurosat/split_zhou_EuroSAT.json",
                    f"{DRIVE}1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
                    "eurosat/2750",
                    "https://madm.dfki.de/files/sentinel/EuroSAT.zip",
                    (13500, 5400, 8100),
                ),
            ),
            "no official split",
        ),
        Download("fgvc_aircraft", "FGVC-Aircraft", 100, (AIRCRAFT_OFFICIAL,)),
        Download(
            "food101",
            "Food101",
            101,
            (
                _coop(
                    "food-101/split_zhou_Food101.json",
                    f"{DRIVE}1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
                    "food-101/images",
                    "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                    (50500, 20200, 30300),
                ),
                FOOD_OFFICIAL,
            ),
        ),
        Download(
            "flowers102",
            "Flowers102",
            102,
            (
                _coop(
                    "oxford_flowers/split_zhou_OxfordFlowers.json",
                    f"{DRIVE}1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
                    "oxford_flowers/jpg",
                    f"{OXFORD}flowers/102/102flowers.tgz",
                    (4093, 1633, 2463),
                ),
                FLOWERS_OFFICIAL,
            ),
        ),
        Download(
            "oxford_pets",
            "Oxford Pets",
            37,
            (
                _coop(
                    "oxford_pets/split_zhou_OxfordPets.json",
                    f"{DRIVE}1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
                    "oxford_pets/images",
                    f"{OXFORD}pets/data/images.tar.gz",
                    (2944, 736, 3669),
                ),
                PETS_OFFICIAL,
            ),
        ),
        Download(
            "sun397",
            "SUN397",
            397,
            (
                _coop(
                    "sun397/split_zhou_SUN397.json",
                    f"{DRIVE}1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
                    "sun397/SUN397",
                    f"{SUN}SUN397.tar.gz",
                    (15880, 3970, 19850),
                ),
                SUN_OFFICIAL,
            ),
        ),
        Download(
            "stanford_cars",
            "Stanford Cars",
            196,
            (
                _coop(
                    "stanford_cars/split_zhou_StanfordCars.json",
                    f"{DRIVE}1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
                    "stanford_cars",
                    f"{CARS}car196/cars_train.tgz",
                    (6509, 1635, 8041),
                    Need(("stanford_cars/cars_train",), f"{CARS}car196/cars_train.tgz"),
                    Need(("stanford_cars/cars_test",), f"{CARS}car196/cars_test.tgz"),
                ),
                CARS_OFFICIAL,
            ),
        ),
        Download(
            "ucf101",
            "UCF101",
            101,
            (
                _coop(
                    "ucf101/split_zhou_UCF101.json",
                    f"{DRIVE}1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
                    "ucf101/UCF-101-midframes",
                    UCF_FRAMES,
                    (7639, 1898, 3783),
                ),
                UCF_OFFICIAL,
            ),
        ),
        Download("imagenet", "ImageNet", 1000, (IMAGENET_OFFICIAL,)),
        Download(
            "cub",
            "CUB-200-2011",
            200,
            (
                _coop(
                    "cub/split_alexey_cub.json",
                    f"{PAPER}split_alexey_cub.json",
                    ("cub/images", "cub/CUB_200_2011/images"),
                    CUB,
                    (3605, 3503, 4680),
                ),
                CUB_OFFICIAL,
            ),
        ),
        Download(
            "stanford_dogs",
            "Stanford Dogs",
            120,
            (
                _coop(
                    "stanford_dogs/split_alexey_stanford_dogs.json",
                    f"{PAPER}split_alexey_stanford_dogs.json",
                    "stanford_dogs/Images",
                    f"{DOGS}images.tar",
                    (6122, 6122, 8336),
                ),
                DOGS_OFFICIAL,
            ),
        ),
        Download(
            "plantdoc",
            "PlantDoc",
            27,
            (
                _coop(
                    "plantdoc/split_alexey_plantdoc.json",
                    f"{PAPER}split_alexey_plantdoc.json",
                    "plantdoc/all_images",
                    PLANTDOC_URL,
                    (515, 515, 1546),
                ),
                PLANTDOC_OFFICIAL,
            ),
            "the paper's all_images numbers the files of both folders, and how is not published; the classes of the "
            "official folders are those of both, one more than the 27 of its test",
        ),
        _shift(
            "imagenet_v2",
            "ImageNet-V2",
            1000,
            ("imagenetv2/imagenetv2-matched-frequency-format-val",),
            "https://huggingface.co/datasets/vaishaal/ImageNetV2 (imagenetv2-matched-frequency.tar.gz)",
            10000,
            "folders are numbers into the sorted wnids",
        ),
        _shift(
            "imagenet_sketch",
            "ImageNet-Sketch",
            1000,
            ("imagenet-sketch/images", "imagenet-sketch/sketch"),
            "https://github.com/HaohanWang/ImageNet-Sketch",
            50889,
            "",
        ),
        _shift(
            "imagenet_a",
            "ImageNet-A",
            200,
            ("imagenet-adversarial/imagenet-a",),
            "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
            7500,
            "labels are numbers into its own 200 classes, by wnid",
        ),
        _shift(
            "imagenet_r",
            "ImageNet-R",
            200,
            ("imagenet-rendition/imagenet-r",),
            "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
            30000,
            "labels are numbers into its own 200 classes, by wnid",
        ),
    )
}
