"""Smaller numbers for a model's matrices, for generation: half or a quarter of the bytes to read for each token.

Notable choices:
- The matrices of the blocks and the output head are quantized; embeddings, norms and attention stay in float32.
- int8 has one scale for each output row of the weights and one for each token of the activations, which are quantized
  on the way in: int8 times int8 has instructions of its own, and sums of whole numbers are exact, so that a row's
  result does not depend on its company.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from model import GPT

ROWS, SMALL = 16, 512


class Int8Linear(nn.Module):
    """A Linear with int8 weights, in the layout that oneDNN wants; float32 in and out. Not for training."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # [out, in]
        self.scales = weight.abs().amax(1).clamp(min=1e-12) / 127  # plain attributes, which are found sooner
        self.zeros = torch.zeros(len(self.scales), dtype=torch.long)
        self.bias = torch.zeros(()) if linear.bias is None else linear.bias.detach().clone()
        quantized = (weight / self.scales[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        # for a few rows of a small matrix oneDNN has but a reference kernel, a hundred times as slow
        self.rows = ROWS if min(weight.shape) < SMALL else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(127)
        q = (x / scale).round_().to(torch.int8)
        rows = q.numel() // q.size(-1)
        if rows < self.rows:
            q = F.pad(q.view(rows, -1), (0, 0, 0, self.rows - rows))
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        if rows < self.rows:
            y = y[:rows].view(*x.shape[:-1], -1)
        return torch.addcmul(self.bias, y, scale)


class BFloat16Linear(nn.Module):
    """A Linear with bfloat16 weights; in and out in the dtype that comes in. Not for training."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight.detach().bfloat16()
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        # oneDNN's own layout of a matrix is 1.6 times as fast for one token as F.linear with a plain one
        self.packed = self.weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
        self.packed = self.packed and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.bfloat16()
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(y, self.weight, self.bias, "none", [], "").to(x.dtype)
        return F.linear(y, self.weight, self.bias).to(x.dtype)


KINDS = {"int8": Int8Linear, "bf16": BFloat16Linear}


def check_quantize(kind: str, device: str) -> None:
    """UserError where there is no such kind, or not on this device."""
    if kind and kind not in KINDS:
        raise UserError(f"quantize={kind}: there are {', '.join(KINDS)}, or nothing for the weights as they are")
    if kind == "int8" and torch.device(device).type != "cpu":
        raise UserError(f"quantize=int8 is for CPUs, not for device={device}: use quantize=bf16 there")
    if kind == "int8" and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        raise UserError("quantize=int8: this PyTorch has no int8 kernels for this CPU (oneDNN); use quantize=bf16")


def quantize(model: GPT, kind: str) -> GPT:
    """The same model, on its device, with the matrices of its blocks and its head in int8 or bf16."""
    for parent in [*model.transformer.h.modules(), model]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, KINDS[kind](child))
    return model
