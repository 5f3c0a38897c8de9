"""Scoring inside PyTorch programs: the operator torch.ops.iosr_fast.score, and a module that calls it with a plan."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.cpp_scorer import by_class
from iosr_fast.scoring.device_plan import DevicePlan, as_tensor, cached, device_plan
from iosr_fast.scoring.fields import ARRAY_NAMES, ARRAYS, CONSTANT_NAMES, CONSTANTS, PlanTerms
from iosr_fast.scoring.inputs import scoring_inputs
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.utils.require import require

require("torch", "cpu")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

_FIELDS = (*ARRAY_NAMES, *CONSTANT_NAMES)
_TYPES = {int: "int", float: "float", str: "str"}
_SCHEMA = "(Tensor plain, Tensor? adapted, {}, str impl) -> Tensor".format(
    ", ".join(
        [
            *(f"Tensor? {name}" for name in ARRAY_NAMES),
            *(f"{_TYPES[field.type]} {field.name}" for field in CONSTANTS),
        ]
    )
)


def score_tensors(
    plan: DevicePlan, plain: Tensor, adapted: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, str]:
    """scoring.score on tensors where they are, norms unchecked: logits (B, C) float32, and the path that ran.

    plain, adapted: (B, D) on plan.device. `impl` as for scoring.score. Raises ValueError if a shape or a device is
    wrong, RuntimeError if `impl` can't run on this device.
    """
    inputs = scoring_inputs(plan, Embeddings(plain, adapted), check=False)
    if plain.device != plan.device:
        raise IosrFastError(f"expected embeddings on {plan.device}, where the plan is, got {plain.device}; move either")
    entry = dispatch.choose(impl, inputs.device)
    if inputs.device not in entry.devices:
        raise UnavailableError(
            f"{entry.name} executes on {' and '.join(entry.devices)}, and the tensors are on {plain.device}; move the "
            "module and its input there, or leave the choice open"
        )
    score, embeddings = entry.load(), inputs.embeddings
    if entry.kind == "tensors":
        rows = (embeddings.plain, embeddings.adapted)
        return score(plan, *(as_tensor(array) if isinstance(array, np.ndarray) else array for array in rows))
    logits, path = score(_host_view(plan), embeddings)
    return as_tensor(logits), path


class _HostView(SimpleNamespace, PlanTerms):
    pass


def _host_view(plan: DevicePlan) -> Any:
    """NumPy views of a CPU plan with ScoringPlan's names; constructing a ScoringPlan would check all keys again."""
    arrays: dict[str, np.ndarray | None] = {}
    for field in ARRAYS:
        tensor: Tensor | None = getattr(plan, field.name)
        if tensor is None:
            array = None
        elif tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.int16).numpy().view(np.uint16)
        else:
            array = tensor.numpy()
        arrays[field.name] = array if array is None or field.device_dtype is None else array.astype(field.dtype)
    reducer = None
    shift, projection = arrays.pop("reducer_shift"), arrays.pop("reducer_projection")
    if not (shift is None and projection is None):
        reducer = object.__new__(Reducer)  # its constructor would check and copy both at every call
        vars(reducer).update(shift=shift, projection=projection)
    constants = {name: getattr(plan, name) for name in ("width", *CONSTANT_NAMES)}
    view = _HostView(**arrays, **constants, reducer=reducer)
    if plan.values is not None:  # every call creates a view; cpp_scorer would transpose its values
        view._values_by_class = cached(plan.values, "by class", lambda: by_class(view.values))
    return view


@torch.library.custom_op("iosr_fast::score", mutates_args=(), schema=_SCHEMA)
def score_op(plain: Tensor, adapted: Tensor | None, *fields: Any) -> Tensor:
    """ScoringPlan's formula on the fields of a DevicePlan: logits (B, C) float32. Norms are unchecked; no gradients."""
    *values, impl = fields
    plan = DevicePlan(width=plain.shape[-1], device=plain.device, **dict(zip(_FIELDS, values, strict=True)))
    return score_tensors(plan, plain, adapted, impl)[0]


@score_op.register_fake
def _logits_like(plain: Tensor, adapted: Tensor | None, *fields: Any) -> Tensor:
    return plain.new_empty((plain.shape[0], fields[_FIELDS.index("n_classes")]), dtype=torch.float32)


class ScoringModule(nn.Module):
    """A plan as a module: forward(plain, adapted) -> logits (B, C) float32, through torch.ops.iosr_fast.score.

    torch.compile(fullgraph=True) takes it as one node; CUDA graphs record it after one eager call. The plan's arrays
    are buffers, on the CPU in the plan's own memory; .to(device) moves them. Their precision belongs to the plan
    (with_key_precision), so .half() and .to(dtype) leave it unchanged. They are not in state_dict, since loading one
    would write to the plan.

    `impl` as for scoring.score. Embeddings must be of unit norm; that is not checked.

    >>> import torch
    >>> from iosr_fast import ScoringPlan
    >>> from iosr_fast.scoring.torch_op import ScoringModule
    >>> head = ScoringModule(ScoringPlan(2, text=torch.eye(2, 4).numpy(), tau=100.0))
    >>> head(torch.eye(4)[:1], None)
    tensor([[100.,   0.]])
    """

    def __init__(self, plan: ScoringPlan, impl: str = "auto") -> None:
        super().__init__()
        on_cpu = device_plan(plan, "cpu")
        for name in ARRAY_NAMES:
            self.register_buffer(name, getattr(on_cpu, name), persistent=False)
        for name in CONSTANT_NAMES:
            setattr(self, name, getattr(plan, name))
        self.width = plan.width
        self.needs_adapted = plan.needs_adapted
        self.impl = impl

    def forward(self, plain: Tensor, adapted: Tensor | None = None) -> Tensor:
        """plain, adapted: (B, D) on the module's device. Raises ValueError for another width or no `adapted`."""
        if self.needs_adapted and adapted is None:
            raise IosrFastError("expected adapted embeddings, which this plan reads, got None")
        if plain.ndim != 2 or plain.shape[1] != self.width:
            raise IosrFastError(f"expected plain embeddings of shape (B, {self.width}), got {tuple(plain.shape)}")
        fields = (getattr(self, name) for name in _FIELDS)
        logits: Tensor = torch.ops.iosr_fast.score(plain, adapted, *fields, self.impl)
        return logits

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}, width={self.width}, impl={self.impl!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoringModule:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
