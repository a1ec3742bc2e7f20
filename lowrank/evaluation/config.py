"""What is measured after training, and how long that may take."""

from dataclasses import dataclass

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
        wrong = [task for task in self.tasks if task not in TASKS]
        if wrong:
            raise ValueError(f"unknown eval task {wrong[0]!r}; known: {', '.join(TASKS)}")
        if self.split not in SPLITS:
            raise ValueError(f"eval.split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} must be at least 1, got {getattr(self, name)}")
        if self.questions < 0:
            raise ValueError(f"eval.questions must not be negative, got {self.questions}")
