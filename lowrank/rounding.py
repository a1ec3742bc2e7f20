"""Rounding a merged weight to NF4 so that the layer's OUTPUT keeps the update, after GPTQ.

Rounding each weight to its nearest value loses an update that is smaller than the grid's steps. Here the columns of W
are rounded one after the other, and what a column loses is made up by the columns that are not rounded yet (Frantar et
al., 2022, arXiv:2210.17323):

    H = Xᵀ X + λ I   over calibration text, X the layer's inputs;     U: upper Cholesky factor of H⁻¹
    for each column j:   q = round(w_j),   W_:,k>j  -=  (w_j - q) / U_jj · U_jk

The scales are given (those of plain rounding, or the base's own), so the stored form is the same; only codes differ.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.adapter import AdaptedLinear
from lowrank.kernels.nf4_codec import pack
from lowrank.quant.codebooks import codebook
from lowrank.quant.tensor import QuantizedTensor

DAMPING = 0.01  # λ as a share of H's mean diagonal: keeps the factor finite where inputs are degenerate


@torch.no_grad()
def collect(model: nn.Module, layers: dict[str, AdaptedLinear], batches: list[Tensor]) -> dict[str, Tensor]:
    """H = Xᵀ X of each layer over batches of token ids, as the model stands now."""
    grams: dict[str, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # layers that are called with the same tensor share one product

    def add(path: str, x: Tensor) -> None:
        if id(x) not in seen:
            rows = x.flatten(0, -2).float()
            seen[id(x)] = x, rows.T @ rows  # x is kept so that its id stays its own
        grams[path] = grams[path] + seen[id(x)][1] if path in grams else seen[id(x)][1]

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, path=path: add(path, args[0]))
        for path, layer in layers.items()
    ]
    try:
        for ids in batches:
            model(ids)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return grams


class Grid:
    """The 16 levels of a format, and the nearest of them."""

    def __init__(self, format: str) -> None:
        levels = codebook(format)
        self.order = levels.argsort().to(torch.uint8)
        self.levels = levels.sort().values
        self.bounds = (self.levels[1:] + self.levels[:-1]) / 2

    def nearest(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and levels of values in [-1, 1]."""
        index = torch.bucketize(scaled, self.bounds)
        return self.order[index], self.levels[index]


@torch.no_grad()
def on_scales_of(old: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """`weight` rounded to the nearest level under the scales of `old`: a weight that did not change keeps its code."""
    codes, _ = Grid(old.format).nearest(_divided(weight.flatten(), old.block_scales(), old.block_size))
    return replace(old, codes=pack(codes))


def _divided(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    per_value = scales.repeat_interleave(block_size)[: values.numel()]
    return torch.where(per_value > 0, values / per_value, torch.zeros_like(values))


@torch.no_grad()
def compensated(weight: Tensor, plain: QuantizedTensor, gram: Tensor) -> QuantizedTensor:
    """`plain` (the nearest rounding of `weight`) with codes chosen for the output.  (O, I), H: (I, I)"""
    O, I = weight.shape
    G = plain.block_size
    if I % G:  # a block would cross rows, so a column has no scale of its own
        return plain
    scales, grid = plain.block_scales().view(O, I // G), Grid(plain.format)
    H = gram + DAMPING * gram.diagonal().mean().clamp(min=1e-8) * torch.eye(I)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, codes = weight.float().clone(), torch.empty(O, I, dtype=torch.uint8)
    for start in range(0, I, G):
        scale = scales[:, start // G]
        part, errors = W[:, start : start + G], torch.empty(O, G)
        for j in range(G):
            codes[:, start + j], level = grid.nearest(_divided(part[:, j], scale, 1))
            errors[:, j] = (part[:, j] - level * scale) / U[start + j, start + j]
            part[:, j + 1 :] -= errors[:, j, None] * U[start + j, start + j + 1 : start + G]
        W[:, start + G :] -= errors @ U[start : start + G, start + G :]
    return replace(plain, codes=pack(codes.flatten()))


def output_survival(stored: Tensor, wanted: Tensor, before: Tensor, gram: Tensor) -> float:
    """1 - |X (stored - W')ᵀ| / |X (W' - W)ᵀ| over the calibration text, from H alone."""
    update = _norm(wanted - before, gram)
    return 1.0 if update == 0 else 1 - _norm(stored - wanted, gram) / update


def _norm(difference: Tensor, gram: Tensor) -> float:
    return float(((difference @ gram) * difference).sum().clamp(min=0).sqrt())
