"""Normalization modules."""

import torch
from torch import Tensor

from pykern import ops


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` computed by `pykern.ops.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `input + residual`, and that sum: (normed, summed), in one pass."""
        return ops.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` computed by `pykern.ops.rms_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.rms_norm(input, self.normalized_shape, self.weight, self.eps)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `input + residual`, and that sum: (normed, summed), in one pass."""
        return ops.add_rms_norm(input, residual, self.normalized_shape, self.weight, self.eps)
