"""What TensorRT-RTX has beyond TensorRT: it compiles kernels at run time, which are kept in the user's cache."""

from __future__ import annotations

import logging
from typing import Any

from iosr_fast.encoders.engine_folder import Target
from iosr_fast.encoders.runtimes.plan_cache import store
from iosr_fast.utils.files import cache_folder
from iosr_fast.utils.machine import this_gpu

log = logging.getLogger(__name__)


class KernelCache:
    """The kernels of an engine on this GPU; `options` of execution contexts that use and extend them."""

    def __init__(self, trt: Any, engine: Any, target: Target, fingerprint: str) -> None:
        self._file = cache_folder() / "kernels" / f"{target.name(str(this_gpu()))}-{fingerprint[:16]}.cache"
        self.options = engine.create_runtime_config()
        self.options.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # A graph would keep the general kernels that run until those for a shape are compiled.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.options.dynamic_shapes_kernel_specialization_strategy = eager
        self._kernels = self.options.create_runtime_cache()
        self.saved = self._file.is_file()
        if self.saved and not self._kernels.deserialize(self._file.read_bytes()):
            log.warning("%s can't be read; its kernels are compiled again", self._file)
            self.saved = False
        self.options.set_runtime_cache(self._kernels)

    def save(self) -> None:
        """Write what was compiled so far."""
        self.saved = True  # one attempt per process, except for `warm`
        store(self._file, self._kernels.serialize())
