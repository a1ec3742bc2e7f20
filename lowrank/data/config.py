"""What a run trains on."""

from dataclasses import dataclass

from lowrank.errors import at_least

GENERAL_LOSSES = ("kl", "ce")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = "labtests-quick"
    """A bundled domain ("labtests", "labtests-quick"), a file of records, or (with `templates`) a knowledge base."""

    templates: str | None = None
    """A YAML file of wordings, or "labtests" for the bundled ones: data.path is then a knowledge base from which
    questions are written."""

    validation: str | None = None
    """A JSONL file of records for the validation loss; bundled domains bring their own."""

    template: str | None = None
    """The chat template: a built-in one's name ("chatml", ...), template text, or null for the checkpoint's own."""

    max_length: int = 512
    """Longest example, in tokens; what is longer is cut, and the start screen says how many were."""

    general_share: float = 0.2
    """Share of the training tokens that are general questions, against forgetting; 0 leaves them out."""

    general_loss: str = "kl"
    """What holds them: "kl" to the unquantized base's distribution at every token, or "ce" on its answers."""

    subjects: int | None = None
    """Take only this many subjects of a bundled domain; null takes all."""

    plain_per_fact: int = 8
    """Plain training questions for each fact of a bundled domain."""

    traps_per_fact: int = 4
    """Trap questions for each fact that carries traps."""

    confirms_per_fact: int = 3
    """True premises for each fact that carries traps."""

    def __post_init__(self) -> None:
        if self.general_loss not in GENERAL_LOSSES:
            raise ValueError(f"data.general_loss must be one of {', '.join(GENERAL_LOSSES)}, got {self.general_loss!r}")
        if not 0 <= self.general_share < 1:
            raise ValueError(f"data.general_share must lie in [0, 1), got {self.general_share}")
        at_least(self, 1, "max_length", "plain_per_fact", group="data.")
