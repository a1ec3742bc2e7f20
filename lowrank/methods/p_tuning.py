"""P-tuning (Liu et al., 2021), arXiv:2103.10385: virtual tokens that an encoder makes from trained vectors.

    P = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃                        "mlp"
    P = W₂ relu(W₁ LSTM(E) + b₁) + b₂, the LSTM in both directions     "lstm"

A file in PEFT's format holds the finished P alone: it loads with the encoder "none".
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lowrank.adapter import register
from lowrank.methods.prompt import Prompt, PromptConfig


@dataclass(frozen=True)
class PTuningConfig(PromptConfig):
    encoder: str = "mlp"
    """mlp, lstm, or none (the vectors themselves)."""

    hidden: int = 128
    """Width of the encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("mlp", "lstm", "none"):
            raise ValueError(f"encoder must be 'mlp', 'lstm' or 'none', got {self.encoder!r}")


@register("p_tuning")
class PTuning(Prompt):
    Config = PTuningConfig

    def __init__(self, config: PTuningConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        dim, hidden = self.prompt_embeddings.shape[1], config.hidden
        self.lstm = nn.LSTM(dim, hidden, 2, bidirectional=True, batch_first=True) if config.encoder == "lstm" else None
        sizes = {"mlp": (dim, hidden, hidden, dim), "lstm": (2 * hidden, 2 * hidden, dim), "none": (dim,)}
        layers: list[nn.Module] = []
        for i, o in zip(sizes[config.encoder], sizes[config.encoder][1:]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def prompt(self) -> Tensor:
        """(P, D)"""
        vectors = self.prompt_embeddings
        return self.mlp(vectors if self.lstm is None else self.lstm(vectors[None])[0][0])  # type: ignore[no-any-return]
