"""docs/datasets.md, made from the catalog: python -m iosr_fast.training.data.datasets_page > docs/datasets.md"""

from __future__ import annotations

from iosr_fast.training.data.evaluation_sets import IMAGENET_SEVEN, Download, Layout, catalog

HEAD = """# Data sets

<!-- Made by python -m iosr_fast.training.data.datasets_page > docs/datasets.md; a test compares. -->

## To train on

| data | files | class |
|---|---|---|
| a folder | one sub-folder of images a class | `FolderPictures` |
| Open Images | a CSV: ImageID, DisplayName, type; images ID.jpg, also in train/ and so on | `OpenImagesPictures` |
| WebDataset shards | .tar files with an image and a label for each key | `ShardPictures` |

`tools/open_images_subset.py` makes a balanced CSV from the official label files, which are at
https://storage.googleapis.com/openimages/web/download_v7.html, and the input list of the official downloader.py.

A sample of a shard is KEY.jpg (.jpeg, .png, .webp) and KEY.cls (an integer), KEY.json ("label" or "class") or KEY.txt
(a class name). Class names can lie beside the shards, in classes.txt. Shards are read from start to end and indexed
once; an epoch shuffles shards, and samples within a window.

## To evaluate on

All sets lie under one root. The first layout whose files all exist is used; nothing is downloaded. Missing files are
listed with their URLs and places before any work (`iosr_fast.training.data.evaluation_sets.check`). Counts are train /
val / test images.
"""


def page() -> str:
    """The text of docs/datasets.md."""
    table = [
        "| name | set | classes | layouts: train / val / test | prompt |",
        "|---|---|---|---|---|",
    ]
    for name, entry in catalog().items():
        layouts = "; ".join(f"{layout.title}: {_counts(layout)}" for layout in entry.layouts)
        table.append(f"| `{name}` | {entry.title} | {entry.classes} | {layouts} | {entry.prompt} |")
    seven = ", ".join(f'"{template}"' for template in IMAGENET_SEVEN)
    prompts = f"ImageNet and its shifted versions use the seven prompts {seven}; the one in the table is CoOp's."
    places = [_places(entry) for entry in catalog().values()]
    return "\n".join([HEAD, *table, "", prompts, "", "## Where to put the files", "", *places])


def _counts(layout: Layout) -> str:
    if not layout.images:
        return "not counted"
    return " / ".join(f"{layout.images[s]:,}" if s in layout.images else "-" for s in ("train", "val", "test"))


def _places(entry: Download) -> str:
    lines = [f"**{entry.title}** (`{entry.name}`){': ' + entry.note if entry.note else ''}", ""]
    for layout in entry.layouts:
        lines.append(f"- {layout.title}")
        lines += [f"  - {' or '.join(f'`{path}`' for path in need.paths)}: {need.url}" for need in layout.needs]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(page(), end="")
