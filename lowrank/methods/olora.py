"""OLoRA: Orthonormal Low-Rank Adaptation (Büyükakyüz, 2024), arXiv:2406.01775.

    W = Q R,  A₀ = the first r rows of R,  B₀ = the first r columns of Q        s = α / r
    y = (W - s B₀ A₀) x + b + s B A x                                            A, B start at A₀, B₀

As in PiSSA, the residual stands in for the base while the adapter acts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.adapter import register
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.pissa import PiSSA


@dataclass(frozen=True)
class OLoRAConfig(LoRAConfig):
    pass


@register("olora")
class OLoRA(PiSSA):
    Config = OLoRAConfig  # type: ignore[assignment]

    def initial(self, weight: Tensor, config: OLoRAConfig) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        Q, R = torch.linalg.qr(weight)  # (O, K), (K, I) with K = min(O, I)
        return R[: config.rank], Q[:, : config.rank]
