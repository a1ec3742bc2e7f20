"""Linear layer and loss in one, in chunks of rows: the logits of a whole sequence never exist at once.

    z = h Wᵀ                     h: (N, D), W: (V, D), z: (N, V)        softcap c: z ← c tanh(z / c)
    cross-entropy                L = Σₙ logsumexp(zₙ) - zₙ[yₙ]            dz = softmax(z) - onehot(y)
    KL to a teacher t            L = Σₙ Σᵥ pₜ (log pₜ - log p)            dz = softmax(z) - softmax(zₜ)
    below a softcap              dz ← dz (1 - (z / c)²)

Both gradients need the logits once more, so dh = dz W (and dW = dzᵀ h, where W trains) is taken in forward, while
the chunk is at hand, and backward only scales it: one product less, and memory for one chunk instead of N rows. The
products are the library's. Between them the kernel reads a chunk's logits twice, in the dtype of the head's product:
for the sum of exponentials, and for the loss and dz, which it writes over them. Each program has one row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.dispatch import launches, store, tl, triton, wide

CHUNK = 128  # rows on a CPU; 128 x 49,152 fp32 logits are 25 MB, reused from chunk to chunk
LAUNCHED = 1024  # rows on a GPU, whose products want more of them; 1,024 x 128,256 logits in bf16 are 263 MB
ROUND = 32  # the last chunk is filled up to a multiple of this: oneDNN keeps half a megabyte of code for each new shape
IGNORED = -100  # the label of a row that carries no loss


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The definition. (N, D), (V, D), (N,) int64 -> the sum over rows, fp32."""
    return F.cross_entropy(_capped(wide(F.linear(hidden, weight)), softcap), labels, reduction="sum")


def linear_kl_ref(hidden: Tensor, teacher: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """The definition: KL(teacher || student). (N, D), (N, D), (V, D) -> the sum over rows, fp32."""
    log_p, log_t = (_capped(wide(F.linear(h, weight)), softcap).log_softmax(-1) for h in (hidden, teacher))
    return F.kl_div(log_p, log_t, reduction="sum", log_target=True)


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@triton.jit
def _logits(z_ptr, v, V, cap, CAPPED: tl.constexpr):
    """fp32; -1e18 where there is no such token: its exponential is 0, and unlike infinity it is no nan less itself."""
    z = tl.load(z_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    if CAPPED:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)  # tanh
    return tl.where(v < V, z, -1e18)


@triton.jit
def _log_normalizer(z_ptr, cap, V: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """log Σ exp z of one row: each lane keeps its own maximum and sum, put together at the end."""
    top, total = tl.full((BLOCK,), -1e18, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z = _logits(z_ptr, start + tl.arange(0, BLOCK), V, cap, CAPPED)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    most = tl.max(top, axis=0)
    return most + tl.log(tl.sum(total * tl.exp(top - most), axis=0))


@triton.jit
def _rows(
    z_ptr, t_ptr, label_ptr, loss_ptr, cap,
    V: tl.constexpr, KL: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row, and dz over its logits."""
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * V
    t_ptr += n * V
    label = 0 if KL else tl.load(label_ptr + n)
    target = 0.0 if KL else _logits(z_ptr, label, V, cap, CAPPED)  # read before dz is written: sums lie between
    normalizer = _log_normalizer(z_ptr, cap, V, CAPPED, BLOCK)
    teacher = _log_normalizer(t_ptr, cap, V, CAPPED, BLOCK) if KL else 0.0
    divergence = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _logits(z_ptr, v, V, cap, CAPPED)
        dz = tl.exp(z - normalizer)
        if KL:
            log_t = _logits(t_ptr, v, V, cap, CAPPED) - teacher
            p_t = tl.exp(log_t)
            divergence += p_t * (log_t - (z - normalizer))
            dz -= p_t
        else:
            dz -= tl.where(v == label, 1.0, 0.0)
        if CAPPED:
            dz *= 1 - (z / cap) * (z / cap)
        store(z_ptr + v, dz, v < V)
    tl.store(loss_ptr + n, tl.sum(divergence, axis=0) if KL else normalizer - target)


class _LinearLoss(torch.autograd.Function):
    """Both losses: `target` is (N,) int64 labels or the teacher's (N, D) hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, cap: float | None, kernel: bool) -> Tensor:
        chunk, losses_of = (LAUNCHED, _launched) if kernel else (CHUNK, _plain)
        size = min(chunk, -(-len(hidden) // ROUND) * ROUND), weight.shape[0]
        product = hidden.new_empty(size)  # in the model's dtype, as the head gives it
        z = product if kernel else product.new_empty(size, dtype=wide(product[:0]).dtype)  # plain code: a copy in fp32
        t = torch.empty_like(z) if target.is_floating_point() else z
        dh = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            n = min(chunk, len(hidden) - start)
            h, y = _filled(hidden[start : start + n]), target[start : start + n]
            loss += losses_of(h, y, weight, cap, product, z, t)
            if dh is None and dw is None:
                continue
            product[n:] = 0
            if dh is not None:
                dh[start : start + n] = (product[: len(h)] @ weight)[:n]
            if dw is not None:
                dw += (product[: len(h)].T @ h).float()
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        dh, dw = ctx.saved_tensors
        (dloss,) = grads
        dh = None if dh is None else dh * dloss.to(dh.dtype)
        return dh, None, None if dw is None else (dw * dloss).to(ctx.weight_dtype), None, None


def _launched(h: Tensor, y: Tensor, weight: Tensor, cap: float | None, product: Tensor, _: Tensor, t: Tensor) -> Tensor:
    """The chunk's loss, by the kernel; dz is left in `product`."""
    torch.mm(h, weight.T, out=product[: len(h)])
    if kl := y.is_floating_point():
        torch.mm(y, weight.T, out=t[: len(y)])
    losses = h.new_empty(len(y), dtype=torch.float32)
    block = min(triton.next_power_of_2(product.shape[1]), 4096)
    how = {"V": product.shape[1], "KL": kl, "CAPPED": cap is not None, "BLOCK": block, "num_warps": 8}
    _rows[(len(y),)](product, t, y, losses, cap or 0.0, **how)
    return losses.sum(dtype=torch.float64)


def _plain(h: Tensor, y: Tensor, weight: Tensor, cap: float | None, product: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The same in library calls, in given memory."""
    n = len(y)
    z = _logits_into(z, h, weight, product, cap)[:n]
    slope = None if cap is None else 1 - (z / cap).square_()
    log_normalizer = z.logsumexp(-1, keepdim=True)  # (n, 1)
    if y.is_floating_point():
        log_t = _logits_into(t, _filled(y), weight, product, cap)[:n]
        log_t -= log_t.logsumexp(-1, keepdim=True)
        log_p = z.sub_(log_normalizer)
        p_t = log_t.exp()
        loss = torch.sum(p_t.mul(log_t.sub_(log_p)), dtype=torch.float64)
        dz = log_p.exp_().sub_(p_t)
    else:
        loss = (log_normalizer - z.gather(1, y[:, None])).double().sum()
        dz = z.sub_(log_normalizer).exp_()  # softmax(z), in z's own memory
        dz[torch.arange(n, device=dz.device), y] -= 1
    product[:n] = dz if slope is None else dz.mul_(slope)  # one rounding, to the dtype of the head's own product
    return loss


def _filled(x: Tensor) -> Tensor:
    """Zero rows behind x up to a multiple of ROUND.  (n, D) -> (m, D)"""
    return F.pad(x, (0, 0, 0, -len(x) % ROUND)) if len(x) % ROUND else x


def _logits_into(out: Tensor, h: Tensor, weight: Tensor, product: Tensor, cap: float | None) -> Tensor:
    """h Wᵀ in fp32, rounded as the head rounds it, in given memory.  (m, D), (V, D) -> (m, V)"""
    torch.mm(h, weight.T, out=product[: len(h)])
    z = out[: len(h)].copy_(product[: len(h)])
    return z if cap is None else z.div_(cap).tanh_().mul_(cap)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Σ cross-entropy of softmax(hidden Wᵀ), fp32. hidden (N, D), weight (V, D) of one dtype; labels (N,) in 0..V-1.

    Rows with the label -100 are left out before anything is computed.
    """
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(hidden)},) int64, got {tuple(labels.shape)} {labels.dtype}")
    kernel = _check("linear_cross_entropy", hidden, weight, softcap, labels=labels)
    if len(labels) and int(labels.min()) == IGNORED:
        hidden, labels = hidden[labels != IGNORED], labels[labels != IGNORED]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(f"labels must lie in 0..{len(weight) - 1}, got {int(labels.min())}..{int(labels.max())}")
    return _apply(hidden, labels, weight, softcap, kernel)


def linear_kl(hidden: Tensor, teacher: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Σ KL(softmax(teacher Wᵀ) || softmax(hidden Wᵀ)), fp32. hidden, teacher (N, D), weight (V, D) of one dtype.

    The teacher and its logits are held constant: no gradient goes through them, W's own included.
    """
    if teacher.shape != hidden.shape or teacher.dtype != hidden.dtype:
        raise ValueError(
            f"teacher must be {tuple(hidden.shape)} {hidden.dtype}, got {tuple(teacher.shape)} {teacher.dtype}"
        )
    return _apply(hidden, teacher, weight, softcap, _check("linear_kl", hidden, weight, softcap, teacher=teacher))


def _apply(hidden: Tensor, target: Tensor, weight: Tensor, softcap: float | None, kernel: bool) -> Tensor:
    with torch.cuda.device_of(hidden):
        return _LinearLoss.apply(hidden, target.contiguous(), weight, softcap, kernel)  # type: ignore[no-untyped-call, no-any-return]


def _check(function: str, hidden: Tensor, weight: Tensor, softcap: float | None, **target: Tensor) -> bool:
    """Whether the kernel runs."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"wanted hidden (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return launches(function, hidden=hidden, weight=weight, **target)
