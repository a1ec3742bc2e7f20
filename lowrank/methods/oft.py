"""OFT: Orthogonal Finetuning (Qiu et al., 2023), arXiv:2306.07280; on the input (Qiu et al., 2025), arXiv:2506.19847.

    y = W (R x) + b,   R = diag(R₁, ...),   Rᵢᵀ = (I - Qᵢ)(I + Qᵢ)⁻¹        Qᵢ: (b, b) skew, upper triangle trained, = 0

Each Rᵢ is a rotation, so R keeps angles and lengths. With `neumann_terms` n > 0 the inverse is a power series instead,
Rᵢᵀ = I + 2 Q + 2 Q² + ... + Qⁿ⁻¹, as PEFT has it (the sign of Q is then the other one).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, register
from lowrank.methods.parts import Checked


@dataclass(frozen=True)
class OFTConfig(Checked):
    block_size: int = 8
    """b; it must divide the layer's input size."""

    neumann_terms: int = 0
    """Terms of the power series; 0 inverts exactly."""


@register("oft")
class OFT(Adapter):
    Config = OFTConfig
    needs_y = False

    def __init__(self, config: OFTConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        size, in_features = config.block_size, features(base)[0]
        if isinstance(base, nn.Embedding):
            raise ValueError("OFT rotates the input, and the input of an embedding is ids")
        if in_features % size:
            near = min((d for d in range(2, in_features + 1) if in_features % d == 0), key=lambda d: abs(d - size))
            raise ValueError(f"block_size {size} does not divide the {in_features} inputs; the nearest is {near}")
        self.size, self.terms = size, config.neumann_terms
        self.oft_R = nn.Parameter(torch.zeros(in_features // size, size * (size - 1) // 2))  # (I/b, b (b - 1) / 2)

    def rotations(self) -> Tensor:
        """Rᵢᵀ, which multiplies x from the right.  (I/b, b, b)"""
        Q = self.oft_R.new_zeros(len(self.oft_R), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=Q.device)
        Q = Q.index_put((torch.arange(len(Q), device=Q.device)[:, None], rows, columns), self.oft_R)
        Q = Q - Q.mT
        one = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
        if not self.terms:
            return torch.linalg.solve(one + Q, one - Q, left=False)  # type: ignore[no-any-return]
        total, power = one + 2 * Q, Q
        for term in range(2, self.terms):
            power = power @ Q
            total = total + (1 if term == self.terms - 1 else 2) * power
        return total

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        blocks = x.to(self.oft_R.dtype).unflatten(-1, (-1, self.size))  # (..., I/b, b)
        rotated = torch.einsum("...nk,nkc->...nc", blocks, self.rotations())
        return base(rotated.flatten(-2).to(x.dtype))  # type: ignore[no-any-return]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        blocks = weight.unflatten(-1, (-1, self.size))  # (O, I/b, b)
        return torch.einsum("onc,nkc->onk", blocks, self.rotations()).flatten(-2), bias
