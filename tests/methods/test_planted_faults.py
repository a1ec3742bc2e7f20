"""The suite must fail on broken methods, and say which theorem each of them breaks."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features
from lowrank.conformance import failures
from lowrank.methods.bottleneck import Houlsby
from lowrank.methods.dora import DoRA
from lowrank.methods.ia3 import IA3
from lowrank.methods.lora import LoRA, LoRAConfig


class SquareOnly(LoRA):
    """Merges A B instead of B A, which only fits where I = O."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * (self.lora_A.T @ self.lora_B.T), bias


class ForgetsScaling(LoRA):
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.lora_B @ self.lora_A, bias


class MergesInPlace(LoRA):
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight += (self.scaling * self.lora_B @ self.lora_A).detach()
        return weight, bias


class ForgetsTheBias(IA3):
    """Scales W x alone when merged, W x + b in forward."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.ia3_l[:, None], bias


class ClaimsToBeMergeable(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = torch.relu(F.linear(x.to(self.lora_A.dtype), self.lora_A))
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)


class HasNoMerge(Houlsby):
    """Bottleneck on a linear layer: it states that it is mergeable and cannot be."""

    place, mergeable = "linear", True

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        Adapter.__init__(self, config, base)
        dim = features(base)[1]
        self.activation, self.scale = "relu", 1.0
        self.down, self.up = nn.Parameter(torch.randn(4, dim)), nn.Parameter(torch.zeros(dim, 4))
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(dim))


class NotANoOp(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        nn.init.normal_(self.lora_B)


class HidesThatItIsANoOp(LoRA):
    identity_at_init = False


_SHARED: dict[tuple[int, ...], nn.Parameter] = {}


class SharesItsMatrix(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.lora_A = _SHARED.setdefault(tuple(self.lora_A.shape), self.lora_A)


class SharesState(LoRA):
    """Keeps the last adapter's matrices in the class."""

    last: "SharesState"

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        type(self).last = self

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return LoRA.forward(type(self).last, x, y, base)


class IgnoresTheSeed(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        with torch.no_grad():
            self.lora_A.uniform_(-1, 1, generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class DrawsInForward(LoRA):
    """Dropout that does not stop in eval mode."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True), y, base)


class MixesTheBatch(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x - x.mean(dim=0, keepdim=True), y, base)


class ReturnsItsOwnDtype(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + self.scaling * F.linear(F.linear(x.float(), self.lora_A), self.lora_B)


class HalfParameters(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.bfloat16()


class DropsTheGradient(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x, y, base).detach() + 0 * self.lora_B.sum() + 0 * self.lora_A.sum()


class DetachesA(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = F.linear(x.to(self.lora_A.dtype), self.lora_A.detach())
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)


class HidesThatItHoldsTheNormConstant(DoRA):
    exact_gradient = True


class CutsTheInputsGradient(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x.detach(), y, base)


class ForgetsToSave(LoRA):
    """Its matrix A is drawn anew in each process and stays out of the file."""

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.register_buffer("secret", torch.randn(config.rank), persistent=False)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.secret
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)


class LooseTensor(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.factor = torch.tensor(self.scaling)


class ChangesTheBase(LoRA):
    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        with torch.no_grad():
            next(base.parameters()).mul_(1.5)


class FusedIsAnotherSum(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x, y, base)

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        return base(x) + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class FusedIsAnotherSumWithoutGradients(LoRA):
    """Right in training; what generation runs forgets the scaling."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x, y, base)

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        y = self(x, base(x), base)
        return y if torch.is_grad_enabled() else (y + base(x)) / 2


class GroupsWithoutWeights(LoRA):
    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return super().forward(x, y, base)

    @classmethod
    def grouped(cls, rows, dtype):
        return super().grouped([(adapter, 2.0) for adapter, _ in rows], dtype)


class TrainsATensorTwice(LoRA):
    def param_groups(self, lr: float) -> list:
        return [{"params": [self.lora_A, self.lora_B], "lr": lr}, {"params": [self.lora_B], "lr": 16 * lr}]


class PenaltyOfAnotherShape(LoRA):
    def penalty(self) -> Tensor | None:
        return self.lora_A.square()


class NanAfterStep(LoRA):
    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        self.lora_A.div_(0 * step)


class DenseOnly(LoRA):
    """Reads base.weight, which a quantized layer does not have."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        delta = (self.scaling * self.lora_B @ self.lora_A).to(base.weight.dtype)
        return F.linear(x, base.weight + delta, base.bias)


class DivideByZeroConfig(LoRAConfig):
    def __post_init__(self) -> None:
        pass


class AcceptsRankZero(LoRA):
    Config = DivideByZeroConfig


@dataclass
class LooseConfig:
    rank: int = 4


class ConfigIsNotFrozen(LoRA):
    Config = LooseConfig  # type: ignore[assignment]


MERGE = "merge == forward, square and not"
FAULTS = {
    SquareOnly: MERGE,
    ForgetsScaling: MERGE,
    MergesInPlace: MERGE,
    ForgetsTheBias: "merge == forward with a bias",
    ClaimsToBeMergeable: MERGE,
    HasNoMerge: MERGE,
    NotANoOp: "identity_at_init is honest",
    HidesThatItIsANoOp: "identity_at_init is honest",
    SharesItsMatrix: "two adapters share no trainable tensor and no state",
    SharesState: "two adapters share no trainable tensor and no state",
    IgnoresTheSeed: "the same seed gives the same adapter",
    DrawsInForward: "the output depends on nothing but the input",
    MixesTheBatch: "the output depends on nothing but the input",
    ReturnsItsOwnDtype: "parameters are fp32 and the output has the base's dtype",
    HalfParameters: "parameters are fp32 and the output has the base's dtype",
    DropsTheGradient: "every trainable parameter gets a gradient",
    DetachesA: "every trainable parameter gets a gradient",
    HidesThatItHoldsTheNormConstant: "the gradient is the slope of the output",
    CutsTheInputsGradient: "the gradient is the slope of the output",
    ForgetsToSave: "save and load bring back each tensor's bytes and the output",
    LooseTensor: "all tensors are parameters or buffers",
    ChangesTheBase: "the base is never changed, and detach brings it back",
    FusedIsAnotherSum: "fused == forward",
    FusedIsAnotherSumWithoutGradients: "fused == forward",
    GroupsWithoutWeights: "rows of a batch run as if alone",
    TrainsATensorTwice: "the hooks keep their promises",
    PenaltyOfAnotherShape: "the hooks keep their promises",
    NanAfterStep: "the hooks keep their promises",
    DenseOnly: "merge == forward on an NF4 base",
    AcceptsRankZero: "configuration is a frozen dataclass with defaults",
    ConfigIsNotFrozen: "configuration is a frozen dataclass with defaults",
}


@pytest.mark.parametrize("method", FAULTS, ids=lambda m: m.__name__)
def test_the_fault_is_caught_by_name(method: type[Adapter]) -> None:
    found = failures(method)
    assert FAULTS[method] in found, f"caught only by {list(found)}"


def test_a_right_method_that_is_written_the_same_way_passes() -> None:
    class Right(LoRA):
        def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
            h = F.linear(x.to(self.lora_A.dtype), self.lora_A) if x.is_floating_point() else self.lora_A.T[x]
            return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)

    assert failures(Right) == {}
