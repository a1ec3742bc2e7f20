"""A padded batch as its real tokens alone, and back: what the decoder's linear layers and norms work on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Moved(torch.autograd.Function):
    """Rows to their places in a larger tensor (`spread`), or from there to its front; zeros elsewhere.

    Each way is the other one's backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int, spread: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.back = (len(x), not spread)
        return _moved(x, index, rows, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _moved(grads[0], *ctx.saved_tensors, *ctx.back), None, None, None


def _moved(x: Tensor, index: Tensor, rows: int, spread: bool) -> Tensor:
    if spread:
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x[: len(index)])
    out = x.new_empty(rows, *x.shape[1:])
    torch.index_select(x, 0, index, out=out[: len(index)])
    out[len(index) :] = 0
    return out


def rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step


class Packing:
    """A padded batch without its padding: linear layers and norms then work on the N real tokens alone.

    Attention gets its rows back: real tokens first, where plain causal attention needs no mask at all, or, for a cache,
    as the batch came. N is filled up to a multiple of 64 and the rows of attention to one of 8: oneDNN keeps about half
    a megabyte of code for each new shape of a product, so that every length its own would cost 700 MB in 80 steps.
    """

    def __init__(self, mask: Tensor, align: bool) -> None:
        self.batch, self.width = mask.shape
        self.given = self.aligned = mask.flatten().nonzero()[:, 0]  # (N,) places in the batch as it came
        self.filled = rounded_up(len(self.given), 64)
        self.taken = F.pad(self.given, (0, self.filled - len(self.given)))  # filled up with the first token
        if align:
            self.width = rounded_up(int(mask.sum(dim=1).max()), 8)
            place = mask.long().cumsum(dim=1) - 1 + torch.arange(self.batch, device=mask.device)[:, None] * self.width
            self.aligned = place.flatten()[self.given]  # (N,) places in (B, W), each row's tokens first

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)"""
        return x.flatten(0, 1)[self.taken][None]

    def unpack(self, x: Tensor, tokens: int) -> Tensor:
        """(1, N, D) -> (B, T, D), zeros where the padding was"""
        return self._spread(x[0], self.given, tokens)

    def rows(self, x: Tensor) -> Tensor:
        """(1, N, H, K) -> (B, W, H, K)"""
        return self._spread(x[0], self.aligned, self.width)

    def collect(self, x: Tensor) -> Tensor:
        """(B, W, D) -> (1, N, D)"""
        return _Moved.apply(x.flatten(0, 1), self.aligned, self.filled, False)[None]  # type: ignore[no-untyped-call, no-any-return]

    def _spread(self, x: Tensor, index: Tensor, width: int) -> Tensor:
        full: Tensor = _Moved.apply(x, index, self.batch * width, True)  # type: ignore[no-untyped-call]
        return full.view(self.batch, width, *x.shape[1:])
