"""The teacher of the KL term: the base as delivered, before quantization.

The head is not quantized, so teacher and student share it and the teacher's final hidden states (D numbers a token) are
all that has to be kept of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from lowrank.data.batches import collate
from lowrank.data.render import Example


@torch.no_grad()
def with_teacher(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[Example]:
    """The same examples, each with the model's final hidden states (T, D) as its teacher."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # alike lengths: little padding
    done: list[Example | None] = [None] * len(examples)
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], pad_id)
        mask = batch["attention_mask"].to(device)
        hidden = model.hidden(batch["input_ids"].to(device), attention_mask=mask).cpu()  # type: ignore[operator]
        for row, i in enumerate(chosen):
            done[i] = replace(examples[i], teacher=hidden[row, : len(examples[i].input_ids)].clone())
        if on_progress:
            on_progress(start + len(chosen))
    return [example for example in done if example is not None]
