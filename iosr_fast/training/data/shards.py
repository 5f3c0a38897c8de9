"""WebDataset shards as a source of training pictures: streamed from start to end, never read at random."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import open_image
from iosr_fast.training.data.shard_index import Shard, find_shards, index_shards, read_samples
from iosr_fast.training.data.sources import digest, to_tensor

MOST_OPEN = 64  # shards in one window: each is an open file


class ShardPictures:
    """Labelled pictures in tar files. Rows are numbered through the shards in order (those of a folder by name).

    `shards`: a folder of .tar files, a path with braces, or a list of those. An epoch takes them in random order and
    shuffles samples within windows of `window`: a pass holds at most a window and two batches of encoded pictures in
    memory. `workers` threads decode (0: the caller's thread). `class_names` default to the lines of `classes.txt`
    beside the shards, else to the distinct labels. `cache` is the folder of the index (default: beside the shards).

    Raises FileNotFoundError for missing shards; ValueError for damaged shards, classes.txt files that differ, labels of
    both kinds (integers and names) or outside the class names; `iterate` raises BadImageError naming shard and key.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        geometry: Geometry,
        workers: int = 2,
        cache: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        window: int = 2000,
    ) -> None:
        if window < 1:
            raise IosrFastError(f"expected a window of at least one sample, got {window}")
        cache = Path(cache) if cache is not None else None
        self.shards: list[Shard] = index_shards(find_shards(shards), cache)
        self.geometry, self.workers, self.window = geometry, workers, window
        names = list(class_names) if class_names is not None else _names_beside(self.shards)
        self.class_names, self.labels = _labels(self.shards, names)
        counts = [len(shard.keys) for shard in self.shards]
        self._start = np.concatenate([[0], np.cumsum(counts)])
        self._shard = np.repeat(np.arange(len(counts)), counts)
        # Equal labels may come from different kinds of labels; the file's size and time distinguish these.
        stamps = [f"{shard.path.name} {shard.bytes} {shard.mtime_ns}" for shard in self.shards]
        self.fingerprint = digest([str(VERSION), str(geometry), self.labels.numpy(), str(self.class_names), *stamps])

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Shards in random order, their samples shuffled within windows: (N,) int64, a function of the generator."""
        blocks: list[torch.Tensor] = []
        parts: list[torch.Tensor] = []

        def close() -> None:
            block = torch.cat(parts)
            blocks.append(block[torch.randperm(len(block), generator=generator)])
            parts.clear()

        room = self.window
        for shard in torch.randperm(len(self.shards), generator=generator).tolist():
            rows = torch.arange(int(self._start[shard]), int(self._start[shard + 1]))
            while len(rows):
                parts.append(rows[:room])
                rows, room = rows[room:], room - len(rows[:room])
                if room == 0 or len(parts) == MOST_OPEN:
                    close()
                    room = self.window
        if parts:
            close()
        return torch.cat(blocks)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As PictureSource, with each row at most once. Rows that a shard has before their place in the order are kept
        in memory until then, and count towards the window.

        Raises ValueError for an order that needs more than a window in memory.
        """
        decoded = self._decode(self._encoded(order.tolist()), ahead=2 * batch)
        for rows in order.split(batch) if len(order) else ():
            yield rows, torch.stack([next(decoded) for _ in rows])

    def _decode(self, pictures: Iterator[tuple[int, bytes]], ahead: int) -> Iterator[torch.Tensor]:
        if self.workers < 1:
            yield from (self._picture(row, data) for row, data in pictures)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            waiting: deque[Future[torch.Tensor]] = deque()
            for row, data in pictures:
                waiting.append(pool.submit(self._picture, row, data))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _picture(self, row: int, data: bytes) -> torch.Tensor:
        shard, position = self._place(row)
        key = shard.keys[position]
        try:
            name = shard.path / f"{key}.{shard.images[position]}"
            return to_tensor(open_image(data, row, name=name), self.geometry)
        except BadImageError as error:
            raise BadImageError(error.path, row, f"{error.reason} (key {key} of shard {shard.path})") from error

    def _place(self, row: int) -> tuple[Shard, int]:
        index = int(self._shard[row])
        return self.shards[index], row - int(self._start[index])

    def _encoded(self, rows: list[int]) -> Iterator[tuple[int, bytes]]:
        """(row, bytes of its image) in the order of `rows`, each shard read forward once and no further than needed."""
        remaining: dict[int, set[int]] = {}
        for row in rows:
            remaining.setdefault(int(self._shard[row]), set()).add(row)
        readers: dict[int, Iterator[tuple[int, bytes]]] = {}
        buffered: dict[int, bytes] = {}
        for row in rows:
            index = int(self._shard[row])
            if index not in readers:
                readers[index] = self._read(index, frozenset(remaining[index]))
            while row not in buffered:
                next_row, data = next(readers[index])
                buffered[next_row] = data
            if len(buffered) > self.window or len(readers) > MOST_OPEN:
                raise IosrFastError(
                    f"this order needs more than the window of {self.window} samples (or {MOST_OPEN} shards) at once; "
                    "expected a part of the order that order() returns, from a source with the same window"
                )
            yield row, buffered.pop(row)
            remaining[index].remove(row)
            if not remaining[index]:
                del readers[index]

    def _read(self, index: int, rows: frozenset[int]) -> Iterator[tuple[int, bytes]]:
        shard, start = self.shards[index], int(self._start[index])
        now = shard.path.stat()  # other labels may lie under the same keys
        same = (now.st_size, now.st_mtime_ns) == (shard.bytes, shard.mtime_ns)
        for position, sample in enumerate(read_samples(shard.path) if same else ()):
            if position >= len(shard.keys) or sample["__key__"] != shard.keys[position]:
                break
            if start + position in rows:
                yield start + position, sample[shard.images[position]]
        raise IosrFastError(f"shard {shard.path} changed after it was opened; open it again")


def _names_beside(shards: list[Shard]) -> list[str] | None:
    files = [folder / "classes.txt" for folder in dict.fromkeys(shard.path.parent for shard in shards)]
    contents = {file: _lines(file) for file in files if file.is_file()}
    for file, names in contents.items():
        if names != (first := next(iter(contents.values()))):
            raise IosrFastError(
                f"expected the same classes beside all shards, got others ({len(names)}) in {file} than in "
                f"{next(iter(contents))} ({len(first)}); give class_names, or make the files equal"
            )
    return next(iter(contents.values()), None)


def _lines(path: Path) -> list[str]:
    """The lines that are not blank. Raises ValueError if the file is not UTF-8."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise IosrFastError(
            f"expected a text file in UTF-8 at {path}, got another or a damaged one ({error})"
        ) from error


def _labels(shards: list[Shard], names: list[str] | None) -> tuple[list[str], torch.Tensor]:
    """The class names and the labels (N,) int64 that index them."""
    distinct = {label for shard in shards for label in shard.labels}
    numbers = {label for label in distinct if isinstance(label, int)}
    if numbers and len(numbers) < len(distinct):
        texts = sorted(str(label) for label in distinct - numbers)
        raise IosrFastError(
            f"expected labels of one kind, got integers ({min(numbers)}, ...) and names ({texts[0]!r}, ...)"
        )
    if names is not None and len(set(names)) < len(names):
        raise IosrFastError(f"expected class names that differ, got {len(names)} of which {len(set(names))} differ")
    if numbers:
        names = names if names is not None else [str(i) for i in range(max(numbers) + 1)]
        index: dict[int | str, int] = {i: i for i in range(len(names))}
    else:
        names = names if names is not None else sorted(str(label) for label in distinct)
        index = {name: i for i, name in enumerate(names)}
    for shard in shards:
        for key, label in zip(shard.keys, shard.labels, strict=True):
            if label not in index:
                raise IosrFastError(
                    f"key {key} of shard {shard.path} has the label {label!r}, which is not one of {len(names)} classes"
                )
    return names, torch.tensor([index[label] for shard in shards for label in shard.labels])
