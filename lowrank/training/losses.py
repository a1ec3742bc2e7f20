"""The loss of a batch: Σ over its target tokens; who divides by how many is the loop's business.

Cross-entropy where labels are, KL to the teacher's distribution where `kl_mask` is. Only positions that carry loss pass
through the head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.kernels.cross_entropy import linear_cross_entropy, linear_kl
from lowrank.models.decoder import positions_from_mask


def targets_in(batch: dict[str, Tensor]) -> int:
    """How many predictions of this batch carry loss: position t predicts the token at t + 1."""
    count = int((batch["labels"][:, 1:] >= 0).sum())
    return count + (int(batch["kl_mask"][:, 1:].sum()) if "kl_mask" in batch else 0)


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Σ of the losses of one batch, fp32."""
    hidden_of = getattr(model, "hidden", None)
    if hidden_of is None:
        return _loss_of_logits(model, batch)
    positions = positions_from_mask(batch["attention_mask"])  # padding on either side gives the same
    x = hidden_of(batch["input_ids"], batch["attention_mask"], positions)[:, :-1]  # (B, T - 1, D)
    labels = batch["labels"][:, 1:]
    target = labels >= 0
    losses = []
    weight: Tensor | None = model.head_weight  # type: ignore[assignment]  # None where the head is more than a product
    if target.any():
        h = x[target]  # (N, D)
        if weight is not None:
            losses.append(linear_cross_entropy(h, weight, labels[target], model.config.final_softcap))  # type: ignore[union-attr, arg-type]
        else:
            losses.append(F.cross_entropy(model.head(h).float(), labels[target], reduction="sum"))  # type: ignore[operator]
    if "kl_mask" in batch:
        losses.append(_kl(model, x, batch["kl_mask"], batch["teacher"], weight))
    if not losses:
        raise ValueError("all labels of this batch are masked: there is nothing to learn from it")
    return torch.stack(losses).sum()


def _kl(model: nn.Module, x: Tensor, kl_mask: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    # position t predicts t + 1: a row of n real tokens has n - 1 predictions, and the teacher's last state none to make
    keep = kl_mask.nonzero()[:, 1] < kl_mask.sum(1)[kl_mask.nonzero()[:, 0]] - 1
    h, t = x[kl_mask[:, 1:]], teacher[keep]
    if weight is not None:
        return linear_kl(h, t.to(h.dtype), weight, model.config.final_softcap)  # type: ignore[union-attr, arg-type]
    log_p = model.head(h).float().log_softmax(-1)  # type: ignore[operator]
    log_t = model.head(t.to(h.dtype)).float().log_softmax(-1)  # type: ignore[operator]
    return F.kl_div(log_p, log_t, reduction="sum", log_target=True)


def _loss_of_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """For a model that is not ours: it gives logits, or an object that has them."""
    if "kl_mask" in batch:
        raise ValueError("KL to a teacher needs a model with hidden() and head(), as lowrank.load gives it")
    result: Any = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = result if isinstance(result, Tensor) else result.logits
    labels = batch["labels"][:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Loss per target token over all batches, without gradients."""
    training = model.training
    model.eval()
    try:
        total = sum(float(summed_loss(model, batch)) for batch in batches)
    finally:
        model.train(training)
    return total / max(sum(targets_in(batch) for batch in batches), 1)
