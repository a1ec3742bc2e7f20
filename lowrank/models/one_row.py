"""Decoding one row on a CPU by compiled layers: each new token reads every weight once, and does little else.

A step of one token is one call a layer, not about thirty, and one for norm and head; `lowrank/quant/compiled.py` says
when they are there. At one row a product is a sum over each row of a weight as it lies in memory, at the speed of
memory. Roundings to bf16 are where the modules round (after each product, norm, rotation and sum); sums are fp32, in
another order than oneDNN's, and the weights of attention stay fp32 until they are summed up.

Models of the plain Llama kind take part; `plain` says which. Whoever changes an equation in `decoder.py` changes
`layer` too: tests/models/test_one_row.py compares the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Slot
from lowrank.kernels.dispatch import mode
from lowrank.models.decoder import MLP, Attention, Block, Decoder, KVCache, RMSNorm, depends_on_length
from lowrank.models.families import Names
from lowrank.models.rope import rotation
from lowrank.quant import compiled
from lowrank.quant.compiled import held, waves
from lowrank.quant.linear import QuantizedLinear, own_forward

BF16 = torch.bfloat16
KINDS: tuple[type[nn.Module], ...] = (Decoder, Block, Attention, MLP, RMSNorm, Slot)
KINDS += (QuantizedLinear, nn.Linear, nn.Embedding, nn.ModuleList, nn.Module)
FORWARDS = {kind: kind.forward for kind in KINDS}  # what `layer` stands for; whoever replaces one gets it


def product(w: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return held(((w.float() * x.float()).sum(-1) + bias.float()).to(BF16))  # (O, I), (I,), (O,) -> (O,)


def normed(x: Tensor, w: Tensor, eps: Tensor) -> Tensor:
    x = x.float()
    return held((x * torch.rsqrt(x.square().mean() + eps) * w.float()).to(BF16))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = x.float().chunk(2, -1), cos.chunk(2), sin.chunk(2)  # (H, K/2), (K/2,)
    return held(torch.cat([(a * cos_a + b * sin_a).to(BF16), (b * cos_b + a * sin_b).to(BF16)], -1))


def layer(
    x: Tensor, cos: Tensor, sin: Tensor, k_old: Tensor, v_old: Tensor, k_new: Tensor, v_new: Tensor,
    eps: Tensor, scale: Tensor, attn_norm: Tensor, mlp_norm: Tensor,
    wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, wg: Tensor, wu: Tensor, wd: Tensor,
    bq: Tensor, bk: Tensor, bv: Tensor, bo: Tensor, bg: Tensor, bu: Tensor, bd: Tensor,
) -> None:  # fmt: skip
    """x (D,) goes through a layer, in place; k_old, v_old (S, Hkv, K); k_new, v_new (Hkv, K) are written."""
    (_, G, K), h = k_old.shape, normed(x, attn_norm, eps)
    q, k, v = product(wq, h, bq), product(wk, h, bk).view(G, K), product(wv, h, bv).view(G, K)
    q, k = turned(q.view(-1, K), cos, sin).view(G, -1, K).float(), turned(k, cos, sin)
    scores = (q[:, :, None] * k_old.transpose(0, 1).float()[:, None]).sum(-1) * scale  # (Hkv, H / Hkv, S)
    own = (q * k.float()[:, None]).sum(-1) * scale  # (Hkv, H / Hkv)
    top = torch.maximum(scores.amax(-1), own)
    share, own = held(torch.exp(scores - top[..., None])), torch.exp(own - top)
    y = (share[..., None, :] * v_old.permute(1, 2, 0).float()[:, None]).sum(-1) + own[..., None] * v.float()[:, None]
    y = held((y / (share.sum(-1) + own)[..., None]).to(BF16).view(-1))  # (H K,)
    attended = held(x + product(wo, y, bo))
    h = normed(attended, mlp_norm, eps)
    h = held((F.silu(product(wg, h, bg).float()) * product(wu, h, bu).float()).to(BF16))
    x.copy_(attended + product(wd, h, bd))
    k_new.copy_(k)
    v_new.copy_(v)


def head(logits: Tensor, x: Tensor, eps: Tensor, norm: Tensor, w: Tensor) -> None:
    """logits (V,) of x (D,)"""
    logits.copy_((w.float() * normed(x, norm, eps).float()).sum(-1).to(BF16))


class Steps:
    """A model's layers as lists of tensors; `steps(cache, id)` reads one token and gives the logits after it."""

    def __init__(self, model: Any, kept: Any, tokens: int) -> None:
        c, n = model.config, model.family.names
        self.embedding, norm, lm_head = (_weight(model.get_submodule(path)) for path in (n.embed, n.norm, n.lm_head))
        eps, scale = (compiled.number(value) for value in (c.norm_eps, c.attn_scale or c.head_dim**-0.5))
        self.layers = [[eps, scale, *_weights(block, n, kept, self.embedding[:1])] for block in model.blocks]
        self.last = [eps, norm, lm_head]
        cos, sin = rotation(c.rope, torch.arange(tokens, device="cpu")[None], tokens)
        self.cos, self.sin = cos[0, :, 0], sin[0, :, 0]  # (tokens, K)
        self.run_layer: Any = compiled.loop("layer")
        self.run_head: Any = compiled.loop("head")

    def complete(self) -> bool:
        """Whether the loops are there, and every tensor is what they were compiled for."""
        given = [t for layer in self.layers for t in layer[2:]] + [self.embedding, *self.last[1:]]
        fit = all(compiled.usable(t) and t.dtype == BF16 and t.is_contiguous() for t in given)
        return fit and all(len(layer) == 18 for layer in self.layers) and None not in (self.run_layer, self.run_head)

    def __call__(self, cache: KVCache, id: int) -> Tensor:
        """-> (1, V)"""
        at, x = cache.stored, self.embedding[id].clone()
        cos, sin = self.cos[at], self.sin[at]
        for weights, (k, v) in zip(self.layers, cache.layers):
            self.run_layer([x, cos, sin, k[0, :at], v[0, :at], k[0, at], v[0, at], *weights])
        cache.stored += 1
        logits = x.new_empty(1, len(self.last[2]))
        self.run_head([logits[0], x, *self.last])
        return logits


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight.detach()


def _weights(block: nn.Module, n: Names, kept: Any, x: Tensor) -> list[Tensor]:
    """What `layer` takes from `attn_norm` on; fewer where a quantized weight has no room as a dense one."""
    attn, mlp = getattr(block, n.attn), getattr(block, n.mlp)
    c = attn.config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    groups = [
        (attn, [n.qkv] if n.qkv else [n.q, n.k, n.v], [q, kv, kv]),
        (attn, [n.o], [c.dim]),
        (mlp, [n.gate_up] if n.gate_up else [n.gate, n.up], [c.hidden_dim] * 2),
        (mlp, [n.down], [c.dim]),
    ]
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for parent, names, sizes in groups:
        layers = tuple(getattr(parent, name) for name in names)
        if any(isinstance(layer, QuantizedLinear) for layer in layers):  # None where some are and some are not
            form = kept.form(layers, x)
            pairs = [] if form is None else [(form.keywords["weight"], form.keywords["bias"])]
        else:
            pairs = [(_weight(layer), layer.bias) for layer in layers]
        for w, b in pairs:
            b = torch.zeros(len(w), dtype=w.dtype) if b is None else b.detach()
            weights += w.split(sizes) if len(pairs) < len(sizes) else [w]
            biases += b.split(sizes) if len(pairs) < len(sizes) else [b]
    return [_weight(getattr(block, n.attn_norm)), _weight(getattr(block, n.mlp_norm)), *weights, *biases]


def plain(model: nn.Module, tokens: int) -> bool:
    """Whether `layer` is what each layer of this model does: rms norms, silu gate, rotation of whole heads, no more."""
    if type(model) is not Decoder or mode() == "triton":
        return False
    c, family, n = model.config, model.family, model.family.names
    rope = c.rope is not None and c.rope.dim == c.head_dim and not c.rope.interleaved and c.rope_local is None
    bare = not (family.conv1d or family.embed_scale or n.positions or n.q_norm or n.attn_post_norm or n.mlp_post_norm)
    embed, lm_head = model.get_submodule(n.embed), model.get_submodule(n.lm_head)
    if type(embed) is not nn.Embedding or type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return False
    return (
        embed.weight.dtype == BF16 and embed.weight.is_cpu
        and rope and bare and family.norm == "rms" and bool(n.gate or n.gate_up) and c.activation == "silu"
        and c.attn_softcap is None and c.final_softcap is None and not depends_on_length(c)
        and all(w is None or w >= tokens for w in c.windows)
        and all(
            type(m).forward is FORWARDS.get(type(m)) and not own_forward(m)
            and not (m._forward_hooks or m._forward_pre_hooks)
            and (type(m) is not RMSNorm or m.eps == c.norm_eps)
            for m in model.modules()
        )
        and not torch.nn.modules.module._global_forward_hooks and not {"head", "hidden"} & model.__dict__.keys()
    )  # fmt: skip


@contextmanager
def one_row(model: nn.Module, rows: int, tokens: int) -> Iterator[Steps | None]:
    """Inside `decoded`: the steps of a model for one row of up to `tokens`, where they apply."""
    if rows != 1 or compiled.loop("layer") is None or compiled.loop("head") is None or not plain(model, tokens):
        yield None
        return
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    kept: Any = next((m.__dict__["_kept"] for m in model.modules() if m.__dict__.get("_kept") is not None), None)
    size = sum(2 * m.out_features * m.in_features for m in quantized)
    # copies in another order are there already where several rows went before: they keep their budget
    if kept is None or size > kept.budget or any(form and not own for (*_, own), (form, *_) in kept.forms.items()):
        yield None
        return
    kept.plain = True
    try:
        steps = Steps(model, kept, tokens)
        if not (whole := steps.complete()):
            kept.forms.clear()
            kept.left = kept.budget
        kept.plain = whole
        yield steps if whole else None
    finally:
        kept.plain = False


def describe() -> str:
    """How `lowrank doctor` puts it."""
    if compiled.loop("layer") and compiled.loop("head"):
        return "one row in bf16 on a CPU: layers compiled for this machine"
    return "eager torch; `lowrank doctor --compile` compiles the layers that decode one row"


def _layer_example(D: int = 640, H: int = 9, G: int = 3, K: int = 64, hidden: int = 1536, S: int = 40) -> list[Tensor]:
    """Sizes all different, of a small model: what is compiled takes any, and divides its loops by these."""
    caches = [waves(S, G, K), waves(S, G, K) / 2, waves(G, K), waves(G, K)]
    sizes = [(H * K, D), (G * K, D), (G * K, D), (D, H * K), (hidden, D), (hidden, D), (D, hidden)]
    weights = [waves(O, I) / I**0.5 for O, I in sizes]
    table = torch.linspace(0, 3, K)
    constants = [torch.tensor(1e-5), torch.tensor(K**-0.5), waves(D), waves(D) + 1]
    return [waves(D) + 0.5, table.cos(), table.sin(), *caches, *constants, *weights, *(waves(O) for O, _ in sizes)]


def _head_example() -> list[Tensor]:
    return [waves(4000), waves(640), torch.tensor(1e-5), waves(640), waves(4000, 640)]


# "threads" decides how many loops of a nest are shared out; each call takes as many threads as torch has
_SETTINGS: dict[str, object] = {"emulate_precision_casts": True, "cpp.threads": 8}
compiled.SOURCES["layer"] = compiled.Source(layer, _layer_example, None, _SETTINGS, compiled.close)
compiled.SOURCES["head"] = compiled.Source(head, _head_example, None, _SETTINGS, compiled.close)
