"""Linear layer and loss in one, in chunks of rows: the logits of a whole sequence never exist at once.

    z = h Wᵀ                     h: (N, D), W: (V, D), z: (N, V)
    cross-entropy                L = Σₙ logsumexp(zₙ) - zₙ[yₙ]            dz = softmax(z) - onehot(y)
    KL to a teacher t            L = Σₙ Σᵥ pₜ (log pₜ - log p)            dz = softmax(z) - softmax(zₜ)

Both gradients need the logits once more, so dh = dz W (and dW = dzᵀ h, where W trains) is taken in forward, while
the chunk is at hand, and backward only scales it: one product less, and memory for one chunk instead of N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128  # rows; 128 x 49,152 fp32 logits are 25 MB, reused from chunk to chunk
ROUND = 32  # the last chunk is filled up to a multiple of this: oneDNN keeps half a megabyte of code for each new shape


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition. (N, D), (V, D), (N,) int64 -> the sum over rows, fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def linear_kl_ref(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The definition: KL(teacher || student). (N, D), (N, D), (V, D) -> the sum over rows, fp32."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    log_t = F.linear(teacher, weight).float().log_softmax(-1)
    return F.kl_div(log_p, log_t, reduction="sum", log_target=True)


class _LinearLoss(torch.autograd.Function):
    """Both losses: `target` is (N,) int64 labels or the teacher's (N, D) hidden states."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        rows, vocabulary = min(CHUNK, -(-len(hidden) // ROUND) * ROUND), weight.shape[0]
        product = hidden.new_empty(rows, vocabulary)  # in the model's dtype, as the head gives it
        z = torch.empty(rows, vocabulary, dtype=torch.float32, device=hidden.device)
        t = torch.empty_like(z) if target.is_floating_point() else None
        dh = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            n = min(CHUNK, len(hidden) - start)
            h, y = _filled(hidden[start : start + n]), target[start : start + n]
            log_normalizer = _logits(h, weight, product, z)[:n].logsumexp(-1, keepdim=True)  # (n, 1)
            if t is None:
                loss += (log_normalizer - z[:n].gather(1, y[:, None])).double().sum()
                dz = z[:n].sub_(log_normalizer).exp_()  # softmax(z), in z's own memory
                dz[torch.arange(n, device=dz.device), y] -= 1
            else:
                log_t = _logits(_filled(y), weight, product, t)[:n]
                log_t -= log_t.logsumexp(-1, keepdim=True)
                log_p = z[:n].sub_(log_normalizer)
                p_t = log_t.exp()
                loss += torch.sum(p_t.mul(log_t.sub_(log_p)), dtype=torch.float64)
                dz = log_p.exp_().sub_(p_t)
            if dh is None and dw is None:
                continue
            product[:n] = dz  # one rounding, to the dtype of the head's own product
            product[n:] = 0
            if dh is not None:
                dh[start : start + n] = (product[: len(h)] @ weight)[:n]
            if dw is not None:
                dw += (product[: len(h)].T @ h).float()
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return loss.float()

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else dh * dloss.to(dh.dtype),
            None,
            None if dw is None else (dw * dloss).to(ctx.weight_dtype),
        )


def _filled(x: Tensor) -> Tensor:
    """Zero rows behind x up to a multiple of ROUND.  (n, D) -> (m, D)"""
    return F.pad(x, (0, 0, 0, -len(x) % ROUND)) if len(x) % ROUND else x


def _logits(h: Tensor, weight: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """h Wᵀ in fp32, rounded as the head rounds it, in given memory.  (m, D), (V, D) -> (m, V)"""
    torch.mm(h, weight.T, out=product[: len(h)])
    return out[: len(h)].copy_(product[: len(h)])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Σ cross-entropy of softmax(hidden Wᵀ), fp32. hidden (N, D), weight (V, D) of one dtype; labels (N,) in 0..V-1."""
    _check(hidden, weight)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(hidden)},) int64, got {tuple(labels.shape)} {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(f"labels must lie in 0..{len(weight) - 1}, got {int(labels.min())}..{int(labels.max())}")
    return _LinearLoss.apply(hidden, labels, weight)


def linear_kl(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ KL(softmax(teacher Wᵀ) || softmax(hidden Wᵀ)), fp32. hidden, teacher (N, D), weight (V, D) of one dtype."""
    _check(hidden, weight)
    if teacher.shape != hidden.shape or teacher.dtype != hidden.dtype:
        raise ValueError(
            f"teacher must be {tuple(hidden.shape)} {hidden.dtype}, got {tuple(teacher.shape)} {teacher.dtype}"
        )
    return _LinearLoss.apply(hidden, teacher, weight)


def _check(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"wanted hidden (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
