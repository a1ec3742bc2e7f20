"""What is measured after training, and how long that may take."""

from dataclasses import dataclass

from lowrank.errors import at_least, unknown

TASKS = ("truth", "ppl")
SPLITS = ("test", "validation")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    tasks: tuple[str, ...] = TASKS
    """truth: the held-out questions; ppl: perplexity of general text. None at all leaves evaluation out."""

    questions: int = 140
    """Questions of the truth evaluation, a stratified subset (60 paraphrases, 40 traps, 20 true premises, 20
    unanswerable, or as many in these proportions); 0 takes all."""

    split: str = "test"
    """Which held-out questions of a domain: "test", or "validation", where recipes are tuned: its wordings, forms and
    invented names are not those of the test."""

    max_new_tokens: int = 40
    batch_size: int = 64

    decoded_mb: int = 512
    """Memory (10^6 bytes) for decoded copies of quantized weights while questions are answered: each is decoded once
    instead of once a token. 0 keeps none."""

    delivered: bool = True
    """Also measure the base as delivered, before quantization."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("eval task", task, TASKS)
        if self.split not in SPLITS:
            raise unknown("eval.split", self.split, SPLITS)
        at_least(self, 1, "max_new_tokens", "batch_size", group="eval.")
        at_least(self, 0, "questions", group="eval.")
