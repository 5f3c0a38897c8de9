"""A linear layer in 8 bits (E4M3) that PyTorch executes as one product of tensor cores, bias included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from iosr_fast.exceptions import UnavailableError

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
MULTIPLE = 16  # of inputs and outputs, which the product demands


class Fp8Linear(nn.Linear):
    """y = s_x s_w E4M3(x / s_x) W8' + b in the dtype of b. Weights are loaded or quantised after construction.

    Both scales are one number: with fp16 outputs the product takes no others. E4M3 rounds each value relative to
    itself, so a scale for each output would gain little.
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, device="meta")
        self.weight = nn.Parameter(torch.empty_like(like.weight, dtype=E4M3), requires_grad=False)
        self.bias = nn.Parameter(torch.empty_like(like.bias), requires_grad=False)
        self.input_scale, self.weight_scale = (nn.Parameter(torch.ones(()), requires_grad=False) for _ in range(2))

    @classmethod
    def quantised(cls, linear: nn.Linear, largest_input: float, largest_weight: float) -> Fp8Linear:
        """`linear` with the scales of these largest absolute values; inputs beyond are clipped."""
        layer = cls(linear)
        layer.input_scale.fill_(max(largest_input, 1e-6) / LARGEST)
        layer.weight_scale.fill_(max(largest_weight, 1e-6) / LARGEST)
        layer.weight.copy_(_rounded(linear.weight, layer.weight_scale))
        layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch._scaled_mm(
            _rounded(x.reshape(-1, self.in_features), self.input_scale),
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,  # else Hopper adds partial sums outside of its tensor cores
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def dequantised(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in fp32, by dequantised values."""
        rows = _rounded(x, self.input_scale).float() * self.input_scale
        return nn.functional.linear(rows, self.weight.float() * self.weight_scale, self.bias.float())


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def insert_fp8_layers(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Replace the linear layers whose weights in `state` are E4M3, so that `module` can load it."""
    for name, value in state.items():
        if value.dtype == E4M3:
            layer = name.removesuffix(".weight")
            linear = module.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            module.set_submodule(layer, Fp8Linear(linear))


def check_fp8(device: str) -> None:
    """Raise UnavailableError where PyTorch computes no fp8 products on `device`."""
    reason = None
    if not hasattr(torch, "_scaled_mm"):
        reason = f"PyTorch {torch.__version__} has no torch._scaled_mm"
    elif device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 9):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.9"
    if reason is not None:
        raise UnavailableError(f"PyTorch computes no fp8 products here: {reason}; build an engine in fp16")
