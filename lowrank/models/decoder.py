"""One decoder for every causal family. What differs between families is data: ModelConfig and Family (families.py).

    x  = embed(ids)                                    B batch   T tokens   D dim   H heads   K head dim
    x += attention(norm(x))    for each layer          S cached + new tokens        F MLP dim   V vocabulary
    x += mlp(norm(x))
    logits = head(norm(x))

Module paths are the checkpoint's own, so that target names and adapter files mean the same everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.adapter import project
from lowrank.models.families import Family, ModelConfig, family_of
from lowrank.models.rope import Rotation, rotate, rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens: 0 at the first one, whatever the padding before it.  (B, T) -> (B, T)"""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · w, fp32 inside; Gemma stores w - 1."""

    def __init__(self, dim: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.float() + 1 if self.plus_one else self.weight
        return F.rms_norm(x.float(), (x.shape[-1],), w.float(), self.eps).to(x.dtype)


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is stored as (I, O)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class KVCache:
    """Keys and values of every layer, allocated once for `capacity` tokens.  2 x (L, B, Hkv, S, K)"""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, Hkv, T, K) behind what is there; `length` moves on when the whole forward is done."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise RuntimeError(f"the cache holds {self.keys.shape[3]} tokens, this forward would need {end}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop every row of the batch but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


@dataclass
class Step:
    """What all layers of one forward share."""

    rotations: dict[bool, Rotation]
    """By whether the layer has a window (Gemma 3 has two ropes)."""
    masks: dict[int | None, Tensor | None]
    """By window: which keys a query sees, (B or 1, 1, T, S) bool; None where plain causal (or no) masking does."""
    causal: bool
    cache: KVCache | None


def attention_mask_for(
    mask: Tensor | None, window: int | None, tokens: int, seen: int, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, S) bool, or None where causal attention alone is right. `mask`: (B, S), 1 = real.

    Padding on the right needs no mask: causal attention never looks right, so real tokens do not see it. A query
    always sees itself, so that a row of padding alone gives numbers (which nobody reads) and no nan.
    """
    total = seen + tokens
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None if seen == 0 or bool(mask.all()) else mask
    windowed = window is not None and total > window
    if mask is None and not windowed and (seen == 0 or tokens == 1):
        return None
    query = torch.arange(seen, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    visible = key <= query
    if windowed:
        visible &= query - key < window
    visible = visible[None, None]
    if mask is not None:
        visible = visible & mask.bool()[:, None, None, :] | (key == query)[None, None]
    return visible


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, family: Family, layer: int) -> None:
        super().__init__()
        self.config, self.names, self.layer = config, family.names, layer
        self.window = config.windows[layer]
        c, n = config, family.names
        q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        linear = Conv1D if family.conv1d else nn.Linear
        if n.qkv:
            self.add_module(n.qkv, linear(c.dim, q_dim + 2 * kv_dim, bias=c.qkv_bias))
        else:
            self.add_module(n.q, linear(c.dim, q_dim, bias=c.qkv_bias))
            self.add_module(n.k, linear(c.dim, kv_dim, bias=c.qkv_bias))
            self.add_module(n.v, linear(c.dim, kv_dim, bias=c.qkv_bias))
        self.add_module(n.o, linear(q_dim, c.dim, bias=c.out_bias))
        for name in filter(None, (n.q_norm, n.k_norm)):
            self.add_module(name, RMSNorm(c.head_dim, c.norm_eps, family.norm == "rms+1"))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        c, n = self.config, self.names
        q, k, v = self.heads(x)  # (B, H, T, K), (B, Hkv, T, K) twice
        if n.q_norm:
            q, k = getattr(self, n.q_norm)(q), getattr(self, n.k_norm)(k)
        rope = c.rope if self.window is None or c.rope_local is None else c.rope_local
        if rope is not None:
            by = step.rotations[rope is c.rope_local]
            q, k = rotate(q, by, rope.interleaved), rotate(k, by, rope.interleaved)
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v)
        y = attend(q, k, v, step.masks[self.window], step.causal, c.attn_scale, c.attn_softcap)  # (B, H, T, K)
        return getattr(self, n.o)(y.transpose(1, 2).reshape(*x.shape[:2], -1))  # type: ignore[no-any-return]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = self.config, self.names
        if n.qkv:
            sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
            q, k, v = getattr(self, n.qkv)(x).split(sizes, dim=-1)
        else:
            q, k, v = project(x, getattr(self, n.q), getattr(self, n.k), getattr(self, n.v))
        shape = (*x.shape[:2], -1, c.head_dim)
        return q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, softcap: float | None
) -> Tensor:
    """softmax(q kᵀ · scale) v with shared key-value heads.  (B, H, T, K), 2 x (B, Hkv, S, K) -> (B, H, T, K)"""
    B, H, T, K = q.shape
    groups = H // k.shape[1]
    causal = causal and mask is None and T > 1
    if softcap is not None:
        scores = q.view(B, -1, groups, T, K) @ k[:, :, None].mT * (scale or 1 / math.sqrt(K))
        scores = softcap * torch.tanh(scores / softcap)
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
        return (scores.float().softmax(-1).to(v.dtype) @ v[:, :, None]).view(B, H, T, K)
    if T == 1 and groups > 1:  # the heads of a group become queries of one head: no copy of k and v
        y = F.scaled_dot_product_attention(q.view(B, -1, groups, K), k, v, attn_mask=mask, scale=scale)
        return y.view(B, H, 1, K)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, family: Family) -> None:
        super().__init__()
        self.names, self.act = family.names, ACTIVATIONS[config.activation]
        c, n = config, family.names
        linear = Conv1D if family.conv1d else nn.Linear
        if n.gate_up:
            self.add_module(n.gate_up, linear(c.dim, 2 * c.hidden_dim, bias=c.mlp_bias))
        else:
            for name in filter(None, (n.gate, n.up)):
                self.add_module(name, linear(c.dim, c.hidden_dim, bias=c.mlp_bias))
        self.add_module(n.down, linear(c.hidden_dim, c.dim, bias=c.mlp_bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F) -> (B, T, D)"""
        n = self.names
        if n.gate_up:
            gate, up = getattr(self, n.gate_up)(x).chunk(2, dim=-1)
            h = self.act(gate) * up
        elif n.gate:
            gate, up = project(x, getattr(self, n.gate), getattr(self, n.up))
            h = self.act(gate) * up
        else:
            h = self.act(getattr(self, n.up)(x))
        return getattr(self, n.down)(h)  # type: ignore[no-any-return]


def norm_of(config: ModelConfig, family: Family) -> nn.Module:
    if family.norm == "layer":
        return nn.LayerNorm(config.dim, eps=config.norm_eps)
    return RMSNorm(config.dim, config.norm_eps, family.norm == "rms+1")


class Block(nn.Module):
    def __init__(self, config: ModelConfig, family: Family, layer: int) -> None:
        super().__init__()
        self.names = n = family.names
        self.add_module(n.attn_norm, norm_of(config, family))
        self.add_module(n.attn, Attention(config, family, layer))
        self.add_module(n.mlp_norm, norm_of(config, family))
        self.add_module(n.mlp, MLP(config, family))
        for name in filter(None, (n.attn_post_norm, n.mlp_post_norm)):
            self.add_module(name, norm_of(config, family))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        n = self.names
        y = getattr(self, n.attn)(getattr(self, n.attn_norm)(x), step)
        x = x + (getattr(self, n.attn_post_norm)(y) if n.attn_post_norm else y)
        y = getattr(self, n.mlp)(getattr(self, n.mlp_norm)(x))
        return x + (getattr(self, n.mlp_post_norm)(y) if n.mlp_post_norm else y)


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, making the plain modules above it."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)


class Decoder(nn.Module):
    """A causal language model. `checkpointing = True` recomputes each layer in backward instead of keeping it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.family = family = family_of(config)
        self.checkpointing = False
        self.origin: Any = None
        n = family.names
        place(self, n.embed, nn.Embedding(config.vocab_size, config.dim))
        if n.positions:
            place(self, n.positions, nn.Embedding(config.max_positions, config.dim))
        place(self, n.layers, nn.ModuleList(Block(config, family, i) for i in range(config.n_layers)))
        place(self, n.norm, norm_of(config, family))
        place(self, n.lm_head, nn.Linear(config.dim, config.vocab_size, bias=False))
        self.tie()

    def tie(self) -> None:
        """The head and the embeddings are one parameter, where the configuration says so."""
        if self.config.tied:
            head, embed = self.get_submodule(self.family.names.lm_head), self.get_submodule(self.family.names.embed)
            head.weight = embed.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) -> logits (B, T, V)"""
        return self.head(self.hidden(input_ids, attention_mask, position_ids, cache))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D) after the final norm. With a cache, `attention_mask` is (B, cached + T)."""
        n = self.family.names
        x = self.get_submodule(n.embed)(input_ids)
        step, positions = self.step(x, attention_mask, position_ids, cache)
        if n.positions:
            x = x + self.get_submodule(n.positions)(positions)
        if self.family.embed_scale:
            x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype)  # rounded to x's dtype, as it was trained
        for block in self.get_submodule(n.layers):  # type: ignore[attr-defined]
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, step, use_reentrant=False)
            else:
                x = block(x, step)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.get_submodule(n.norm)(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)"""
        logits = self.get_submodule(self.family.names.lm_head)(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)  # type: ignore[no-any-return]

    def step(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
    ) -> tuple[Step, Tensor]:
        """What the layers share, and the positions (0..T-1 after what is cached, unless given).  x: (B, T, D)"""
        c = self.config
        tokens, seen = x.shape[1], 0 if cache is None else cache.length
        if mask is not None and mask.shape != (x.shape[0], seen + tokens):
            raise ValueError(f"attention_mask must be {(x.shape[0], seen + tokens)}, got {tuple(mask.shape)}")
        positions = torch.arange(seen, seen + tokens, device=x.device)[None] if position_ids is None else position_ids
        length = seen + tokens
        rotations = {
            local: rotation(rope, positions, length)
            for local, rope in ((False, c.rope), (True, c.rope_local))
            if rope is not None
        }
        masks = {w: attention_mask_for(mask, w, tokens, seen, x.device) for w in set(c.windows)}
        return Step(rotations, masks, causal=seen == 0, cache=cache), positions
