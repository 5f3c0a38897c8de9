"""Launch configurations: tile shapes, warps and pipeline stages by GPU, path, key precision and batch.

launch_configs.json stores them. "default" is for every GPU without an entry of its own.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from iosr_fast.exceptions import IosrFastError

PATHS = ("affine", "dense", "few", "aligned", "ragged", "aligned-tma", "ragged-tma")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
FEW_QUERIES = 32
CONFIGS_FILE = Path(__file__).with_name("launch_configs.json")

Load = Literal["few", "many"]


@dataclass(frozen=True)
class Config:
    """block_b queries by block_n keys (classes, for the affine terms) per tile, block_d channels per step.

    swap       put keys on the longer side of the tensor cores (affine and dense)
    block_v    value columns (dense)
    programs   programs per multiprocessor, where each takes several tiles in turn
    """

    block_b: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    swap: bool = False
    block_v: int = 64
    programs: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("swap", "num_stages"):
                continue
            least = 1 if name in ("num_warps", "programs") else 16
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise IosrFastError(f"expected {name} a power of two of at least {least}, got {value!r}")
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise IosrFastError(f"expected num_stages of at least 1, got {self.num_stages!r}")

    def meta(self, *extra: str) -> dict[str, Any]:
        """Keyword arguments of a launch; `extra` names block_v for kernels that take it."""
        names = ("block_b", "block_n", "block_d", "swap", *extra)
        return {name.upper(): getattr(self, name) for name in names} | self.options()

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def loads(path: str) -> tuple[Load, ...]:
    """The loads that a path is for."""
    if path in ("affine", "dense"):
        return ("few", "many")
    return ("few",) if path == "few" else ("many",)


def load_of(batch: int) -> Load:
    """The configuration of an entry for a batch: "few" or "many" queries."""
    return "few" if batch <= FEW_QUERIES else "many"


@functools.cache
def read_configs() -> dict[str, Any]:
    """launch_configs.json: GPU name -> path -> precision -> "few" or "many" -> the fields of Config."""
    configs: dict[str, Any] = json.loads(CONFIGS_FILE.read_text(encoding="utf-8"))
    return configs


@functools.cache
def config_for(gpu: str, path: str, precision: str, load: Load) -> Config:
    """The configuration of a GPU, by its torch.cuda.get_device_name(), or else the default.

    Raises ValueError for an unknown path or precision, and for an invalid entry of the file.
    """
    configs = read_configs()
    for name in (gpu, "default"):
        entry = configs.get(name, {}).get(path, {}).get(precision, {}).get(load)
        if entry is None:
            continue
        try:
            return Config(**entry)
        except (TypeError, ValueError) as error:
            place = f"{CONFIGS_FILE.name}, {name!r}/{path}/{precision}/{load}"
            raise IosrFastError(f"{place}: {error}; correct the entry") from error
    raise IosrFastError(
        f"expected a path of {', '.join(PATHS)} and a precision of {', '.join(PRECISIONS)} that "
        f"{CONFIGS_FILE.name} has, got {path!r} and {precision!r}"
    )


def dense_config(gpu: str, precision: str, load: Load, float_values: bool) -> Config:
    """config_for() of the dense path. Its entries for float16 and int8 keys are measured with float16 values; float32
    values need twice the registers, so a tile has half as many keys."""
    config = config_for(gpu, "dense", precision, load)
    if float_values and precision in ("fp16", "int8"):
        return replace(config, block_n=max(16, config.block_n // 2))
    return config
