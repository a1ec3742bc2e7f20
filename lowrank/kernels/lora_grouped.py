"""LoRA with another adapter for each row of the batch, as S-LoRA (Sheng et al., 2023), arXiv:2311.03285, serves it.

    d_n = s_n B_n A_n x_n        N rows   T tokens   x: (N, T, I),  A: (N, R, I),  B: (N, O, R),  s: (N,)

A row whose adapter has a smaller rank is filled up with zero rows of A and zero columns of B.
"""

import torch
from torch import Tensor


def lora_grouped_ref(x: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None = None) -> Tensor:
    """The definition, in A's dtype: two batched products.  -> (N, T, O)"""
    h = torch.bmm(x.to(A.dtype), A.mT)  # (N, T, R)
    return torch.bmm(h if scaling is None else h * scaling[:, None, None], B.mT)


def lora_grouped(x: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None = None) -> Tensor:
    """What each row's adapter adds to y; `scaling` is 1 unless given.

    (N, T, I), (N, R, I), (N, O, R), (N,) -> (N, T, O) in A's dtype
    """
    N, R, I = A.shape
    if (
        x.dim() != 3
        or x.shape[::2] != (N, I)
        or B.shape[::2] != (N, R)
        or (scaling is not None and scaling.shape != (N,))
    ):
        raise ValueError(
            "lora_grouped needs x (N, T, I), A (N, R, I), B (N, O, R), scaling (N,), got"
            f" {[tuple(t.shape) for t in (x, A, B, scaling) if t is not None]}"
        )
    return lora_grouped_ref(x, A, B, scaling)
