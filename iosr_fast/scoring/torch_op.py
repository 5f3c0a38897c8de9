"""Scoring inside PyTorch programs: the operator torch.ops.iosr_fast.score, and a module that calls it on a plan."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.device_plan import DevicePlan, as_tensor, device_plan
from iosr_fast.scoring.inputs import scoring_inputs
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.utils.require import require

require("torch", "train")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

_ARRAYS = (
    "text",
    "keys",
    "key_scales",
    "class_offsets",
    "weights",
    "linear",
    "bias",
    "query_transform",
    "values",
    "reducer_shift",
    "reducer_projection",
)
_CONSTANTS = ("n_classes", "tau", "alpha", "beta", "temperature", "query", "feature")
_SCHEMA = (
    f"(Tensor plain, Tensor? adapted, {', '.join(f'Tensor? {name}' for name in _ARRAYS)}, int n_classes, float tau, "
    "float alpha, float beta, float temperature, str query, str feature, str impl) -> Tensor"
)


def score_tensors(
    plan: DevicePlan, plain: Tensor, adapted: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, str]:
    """scoring.score on tensors where they are, norms unchecked: logits (B, C) float32, and the path that ran.

    plain, adapted: (B, D) on plan.device. `impl` as for scoring.score. Raises ValueError where a shape or a device is
    another, RuntimeError where `impl` can't run on this device.
    """
    batch = scoring_inputs(plan, Embeddings(plain, adapted), check=False)
    if plain.device != plan.device:
        raise ValueError(f"expected embeddings on {plan.device}, where the plan is, got {plain.device}; move either")
    entry = dispatch.choose(impl, batch.device)
    if batch.device not in entry.devices:
        raise RuntimeError(
            f"{entry.name} executes on {' and '.join(entry.devices)}, and the tensors are on {plain.device}; move the "
            "module and its input there, or leave the choice open"
        )
    run, given = entry.load(), batch.embeddings
    if entry.kind == "tensors":
        on_cpu = batch.device == "cpu"
        tensors = [
            as_tensor(array) if on_cpu and array is not None else array for array in (given.plain, given.adapted)
        ]
        return run(plan, *tensors)
    logits, path = run(_arrays(plan), given)
    return as_tensor(logits), path


def _arrays(plan: DevicePlan) -> Any:
    """NumPy views of a plan on the CPU under ScoringPlan's names; making a ScoringPlan would check all keys again."""

    def view(tensor: Tensor | None) -> np.ndarray | None:
        if tensor is None:
            return None
        if tensor.dtype == torch.bfloat16:
            bits: np.ndarray = tensor.view(torch.int16).numpy().view(np.uint16)
            return bits
        array: np.ndarray = tensor.numpy()
        return array

    views = {name: view(getattr(plan, name)) for name in _ARRAYS}
    if views["class_offsets"] is not None:
        views["class_offsets"] = views["class_offsets"].astype(np.int64)
    reducer = _reducer(views.pop("reducer_shift"), views.pop("reducer_projection"))
    constants = {name: getattr(plan, name) for name in ("width", *_CONSTANTS)}
    return SimpleNamespace(**views, **constants, reducer=reducer)


def _reducer(shift: np.ndarray | None, projection: np.ndarray | None) -> Reducer | None:
    """A Reducer on arrays that another has checked; its constructor would look at them, and copy them, at each call."""
    if shift is None and projection is None:
        return None
    reducer = object.__new__(Reducer)
    vars(reducer).update(shift=shift, projection=projection)
    return reducer


@torch.library.custom_op("iosr_fast::score", mutates_args=(), schema=_SCHEMA)
def score_op(
    plain: Tensor,
    adapted: Tensor | None,
    text: Tensor | None,
    keys: Tensor | None,
    key_scales: Tensor | None,
    class_offsets: Tensor | None,
    weights: Tensor | None,
    linear: Tensor | None,
    bias: Tensor | None,
    query_transform: Tensor | None,
    values: Tensor | None,
    reducer_shift: Tensor | None,
    reducer_projection: Tensor | None,
    n_classes: int,
    tau: float,
    alpha: float,
    beta: float,
    temperature: float,
    query: str,
    feature: str,
    impl: str,
) -> Tensor:
    """ScoringPlan's formula on a DevicePlan's parts: logits (B, C) float32. Norms are not checked; no gradients."""
    plan = DevicePlan(
        n_classes=n_classes,
        width=plain.shape[-1],
        text=text,
        tau=tau,
        keys=keys,
        key_scales=key_scales,
        class_offsets=class_offsets,
        weights=weights,
        alpha=alpha,
        beta=beta,
        linear=linear,
        bias=bias,
        query=query,
        feature=feature,
        device=plain.device,
        query_transform=query_transform,
        values=values,
        reducer_shift=reducer_shift,
        reducer_projection=reducer_projection,
        temperature=temperature,
    )
    return score_tensors(plan, plain, adapted, impl)[0]


@score_op.register_fake
def _shape_of_logits(plain: Tensor, *rest: Any) -> Tensor:
    n_classes = rest[1 + len(_ARRAYS)]
    return plain.new_empty((plain.shape[0], n_classes), dtype=torch.float32)


class ScoringModule(nn.Module):
    """A plan as a module: forward(plain, adapted) -> logits (B, C) float32, through torch.ops.iosr_fast.score.

    torch.compile(fullgraph=True) takes it as one node, and CUDA graphs record it. The plan's arrays are buffers, on the
    CPU in the plan's own memory: .to(device) moves them. Their precision is the plan's business (with_key_precision),
    so .half() and .to(dtype) leave it alone. They are no part of state_dict, since loading one would write to the plan.

    `impl` as for scoring.score. Embeddings must be of unit norm; that is not checked here.
    """

    def __init__(self, plan: ScoringPlan, impl: str = "auto") -> None:
        super().__init__()
        parts = device_plan(plan, "cpu")
        for name in _ARRAYS:
            self.register_buffer(name, getattr(parts, name), persistent=False)
        for name in _CONSTANTS:
            setattr(self, name, getattr(plan, name))
        self.width = plan.width
        self.needs_adapted = plan.needs_adapted
        self.impl = impl

    def forward(self, plain: Tensor, adapted: Tensor | None = None) -> Tensor:
        """plain, adapted: (B, D) on the module's device. Raises ValueError for another width or no `adapted`."""
        if self.needs_adapted and adapted is None:
            raise ValueError("expected adapted embeddings, which this plan reads, got None")
        if plain.ndim != 2 or plain.shape[1] != self.width:
            raise ValueError(f"expected plain embeddings of shape (B, {self.width}), got {tuple(plain.shape)}")
        logits: Tensor = torch.ops.iosr_fast.score(
            plain,
            adapted,
            *(getattr(self, name) for name in (*_ARRAYS, *_CONSTANTS)),
            self.impl,
        )
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
