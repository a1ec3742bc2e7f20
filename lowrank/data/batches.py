"""Examples -> batches, in an order that a seed fixes and a state dictionary resumes.

A batch is a dictionary of tensors, padded on the right:

    input_ids (B, T) int64 · attention_mask (B, T) bool · labels (B, T) int64, unshifted, -100 where no loss is taken
    kl_mask (B, T) bool and teacher (n, D): where and what the teacher's hidden states are, for rows held by KL
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.data.render import IGNORE, Example

Batch = dict[str, Tensor]
WINDOW = 16  # batches among which examples are dealt by length


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch, as wide as its longest example."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    kl_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    teachers = []
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[row, :n] = torch.tensor(example.input_ids)
        mask[row, :n] = True
        if example.teacher is None:
            labels[row, :n] = torch.tensor(example.labels)
        else:
            kl_mask[row, :n] = True
            teachers.append(example.teacher)
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if teachers:
        batch |= {"kl_mask": kl_mask, "teacher": torch.cat(teachers)}
    return batch


def split(batch: Batch, micro_batch_size: int | None) -> list[Batch]:
    """The rows of a batch in micro-batches, each cut to its own longest row."""
    rows = len(batch["input_ids"])
    if micro_batch_size is None or micro_batch_size >= rows:
        return [batch]
    parts, before = [], 0
    for start in range(0, rows, micro_batch_size):
        part = {key: value[start : start + micro_batch_size] for key, value in batch.items() if key != "teacher"}
        real = part["attention_mask"].bool().any(0).nonzero()
        width = int(real[-1]) + 1 if len(real) else 1
        part = {key: value[:, :width] for key, value in part.items()}
        if "teacher" in batch:
            n = int(part["kl_mask"].sum())
            part["teacher"] = batch["teacher"][before : before + n]
            before += n
            if n == 0:
                del part["teacher"], part["kl_mask"]
        parts.append(part)
    return parts


class Loader:
    """Batches of `examples`, without end; each pass has its own order, fixed by (seed, pass)."""

    def __init__(self, examples: Sequence[Example], batch_size: int, pad_id: int, seed: int = 0) -> None:
        if not examples:
            raise ValueError("there is nothing to train on: the data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.examples, self.batch_size, self.pad_id, self.seed = examples, batch_size, pad_id, seed
        self.epoch = self.position = 0

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def next(self) -> Batch:
        order = self._order()
        chosen = order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if self.position >= len(order):
            self.epoch, self.position = self.epoch + 1, 0
        return collate([self.examples[i] for i in chosen], self.pad_id)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self.examples), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch_size
        span = WINDOW * self.batch_size
        dealt = [i for start in range(0, whole, span) for i in self._deal(order[start : min(start + span, whole)])]
        return dealt + order[whole:]

    def _deal(self, window: list[int]) -> list[int]:
        """The same examples, long and short ones dealt evenly to the window's batches, to and fro.

        Batches of like size need no more memory than the average one, and each has its share of long examples.
        """
        count = len(window) // self.batch_size
        by_length = sorted(window, key=lambda i: (-len(self.examples[i].input_ids), i))
        batches: list[list[int]] = [[] for _ in range(count)]
        for turn in range(self.batch_size):
            row = by_length[turn * count : (turn + 1) * count]
            for batch, i in zip(batches, row if turn % 2 == 0 else reversed(row)):
                batch.append(i)
        return [i for batch in batches for i in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "examples": len(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, here in (("seed", self.seed), ("examples", len(self.examples))):
            if state[key] != here:
                raise ValueError(f"cannot resume: the data had {key}={state[key]} and has {here} now")
        self.epoch, self.position = state["epoch"], state["position"]
