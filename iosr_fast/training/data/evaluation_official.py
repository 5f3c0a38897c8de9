"""The evaluation sets in their own official splits: which files they need, where those come from, and what reads them.

Counts of images are those that the sets' authors publish.
"""

from __future__ import annotations

from iosr_fast.training.data import evaluation_readers as readers
from iosr_fast.training.data.evaluation_files import Layout, Need

DRIVE = "https://drive.google.com/file/d/"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
CARS = "http://ai.stanford.edu/~jkrause/"
DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
IMAGENET = "https://image-net.org/download.php"
CLASSNAMES = f"{DRIVE}1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"
SUN = "http://vision.princeton.edu/projects/2010/SUN/"
UCF_FRAMES = f"{DRIVE}10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"
UCF_LISTS = "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"

FLOWERS_OFFICIAL = Layout(
    "official split, through torchvision",
    (
        Need(("flowers-102/jpg",), f"{OXFORD}flowers/102/102flowers.tgz"),
        Need(("flowers-102/imagelabels.mat",), f"{OXFORD}flowers/102/imagelabels.mat"),
        Need(("flowers-102/setid.mat",), f"{OXFORD}flowers/102/setid.mat"),
    ),
    {"train": 1020, "val": 1020, "test": 6149},
    readers.torchvision_set("Flowers102", {"train": "train", "val": "val", "test": "test"}),
)
FOOD_OFFICIAL = Layout(
    "official split, through torchvision",
    tuple(
        Need((f"food-101/{path}",), "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz") for path in ("meta", "images")
    ),
    {"train": 75750, "test": 25250},
    readers.torchvision_set("Food101", {"train": "train", "test": "test"}),
)
PETS_OFFICIAL = Layout(
    "official split, through torchvision",
    tuple(Need((f"oxford-iiit-pet/{part}",), f"{OXFORD}pets/data/{part}.tar.gz") for part in ("images", "annotations")),
    {"train": 3680, "test": 3669},
    readers.torchvision_set("OxfordIIITPet", {"train": "trainval", "test": "test"}),
)
DTD_OFFICIAL = Layout(
    "official split 1, through torchvision",
    tuple(Need((f"dtd/dtd/{part}",), f"{OXFORD}dtd/download/dtd-r1.0.1.tar.gz") for part in ("images", "labels")),
    {"train": 1880, "val": 1880, "test": 1880},
    readers.torchvision_set("DTD", {"train": "train", "val": "val", "test": "test"}),
)
CARS_OFFICIAL = Layout(
    "official split, through torchvision",
    (
        Need(("stanford_cars/devkit",), f"{CARS}cars/car_devkit.tgz"),
        Need(("stanford_cars/cars_train",), f"{CARS}car196/cars_train.tgz"),
        Need(("stanford_cars/cars_test",), f"{CARS}car196/cars_test.tgz"),
        Need(("stanford_cars/cars_test_annos_withlabels.mat",), f"{CARS}car196/cars_test_annos_withlabels.mat"),
    ),
    {"train": 8144, "test": 8041},
    readers.torchvision_set("StanfordCars", {"train": "train", "test": "test"}),
)
_AIRCRAFT_URL = f"{OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
_AIRCRAFT_FILES = ("variants.txt", *(f"images_variant_{s}.txt" for s in ("train", "val", "test")), "images")
AIRCRAFT_OFFICIAL = Layout(
    "official split (which is CoOp's too)",
    tuple(
        Need((f"fgvc_aircraft/{file}", f"fgvc-aircraft-2013b/data/{file}"), _AIRCRAFT_URL) for file in _AIRCRAFT_FILES
    ),
    {"train": 3334, "val": 3333, "test": 3333},
    readers.aircraft,
)
SUN_OFFICIAL = Layout(
    "official partition 01",
    (
        *(
            Need((f"sun397/{file}.txt", f"sun397/Partitions/{file}.txt"), f"{SUN}download/Partitions.zip")
            for file in ("ClassName", "Training_01", "Testing_01")
        ),
        Need(("sun397/SUN397",), f"{SUN}SUN397.tar.gz"),
    ),
    {"train": 19850, "test": 19850},
    readers.sun397,
)
UCF_OFFICIAL = Layout(
    "official split 01 on CoOp's middle frames",
    (
        *(
            Need((f"ucf101/ucfTrainTestlist/{file}.txt",), UCF_LISTS)
            for file in ("classInd", "trainlist01", "testlist01")
        ),
        Need(("ucf101/UCF-101-midframes",), UCF_FRAMES),
    ),
    {"train": 9537, "test": 3783},
    readers.ucf101,
)
_CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images")
CUB_OFFICIAL = Layout(
    "official split",
    tuple(Need((f"cub/{file}", f"cub/CUB_200_2011/{file}"), CUB) for file in _CUB_FILES),
    {"train": 5994, "test": 5794},
    readers.cub,
)
DOGS_OFFICIAL = Layout(
    "official split",
    (
        *(
            Need((f"stanford_dogs/{s}_list.mat", f"stanford_dogs/lists/{s}_list.mat"), f"{DOGS}lists.tar")
            for s in ("train", "test")
        ),
        Need(("stanford_dogs/Images",), f"{DOGS}images.tar"),
    ),
    {"train": 12000, "test": 8580},
    readers.dogs,
)
PLANTDOC_URL = "https://github.com/pratikkayal/PlantDoc-Dataset"
PLANTDOC_OFFICIAL = Layout(
    "official split",
    tuple(Need((f"plantdoc/{s}", f"plantdoc/PlantDoc-Dataset/{s}"), PLANTDOC_URL) for s in ("train", "test")),
    {},
    readers.plantdoc,
)
IMAGENET_OFFICIAL = Layout(
    "train and val, val being the test",
    (
        Need(("imagenet/classnames.txt",), CLASSNAMES),
        Need(("imagenet/images/train", "imagenet/train"), f"{IMAGENET} (ILSVRC2012_img_train.tar)"),
        Need(
            ("imagenet/images/val", "imagenet/val"), f"{IMAGENET} (ILSVRC2012_img_val.tar, sorted into class folders)"
        ),
    ),
    {"train": 1281167, "test": 50000},
    readers.imagenet,
)
