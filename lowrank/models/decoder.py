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
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.active import checkpoint_contexts
from lowrank.adapter import AdaptedLinear, Slot, project
from lowrank.kernels.dispatch import mode
from lowrank.kernels.rms_norm import rms_norm
from lowrank.kernels.rope import rope, rope_ref
from lowrank.kernels.short_attention import pays as short_attention_pays
from lowrank.kernels.short_attention import short_attention
from lowrank.kernels.swiglu import swiglu
from lowrank.models.families import Family, ModelConfig, family_of
from lowrank.models.packing import Packing
from lowrank.models.rope import Rotation, rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens: 0 at the first one, whatever the padding before it.  (B, T) -> (B, T)"""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def quick(x: Tensor) -> bool:
    """Whether plain torch calls will do: no gradient, on a CPU. At one token a step the calls alone cost time."""
    return x.is_cpu and not torch.is_grad_enabled() and mode() != "triton"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · w, fp32 inside and rounded once; Gemma stores w - 1."""

    def __init__(self, dim: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        if quick(x) and not self.plus_one and self.weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, float(self.plus_one))


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
    """Keys and values of every layer, allocated once for `capacity` tokens.  L x 2 x (B, S, Hkv, K)"""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, capacity, config.n_kv_heads, config.head_dim)
        self.layers = [[torch.empty(shape, dtype=dtype, device=device) for _ in "kv"] for _ in range(config.n_layers)]
        self.stored = self.virtual = 0  # tokens, and how many of them are virtual (prompt tuning)

    @property
    def length(self) -> int:
        """Real tokens that are stored."""
        return self.stored - self.virtual

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, Hkv, T, K) behind what is there; `stored` moves on when the whole forward is done."""
        held, end = self.layers[layer], self.stored + new[0].shape[2]
        for i, kv in enumerate(new):
            if end > held[i].shape[1]:  # virtual tokens that the caller did not count
                held[i] = F.pad(held[i], (0, 0, 0, 0, 0, end))
            held[i][:, self.stored : end] = kv.transpose(1, 2)
        return held[0][:, :end].transpose(1, 2), held[1][:, :end].transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Drop every row of the batch but these."""
        for held in self.layers:
            held[:] = [kv[rows] for kv in held]


@dataclass
class Step:
    """What all layers of one forward share."""

    rotations: dict[bool, Rotation]
    """By whether the layer has a window (Gemma 3 has two ropes)."""
    masks: dict[int | None, Tensor | None]
    """By window: which keys a query sees, (B or 1, 1, T, S) bool; None where plain causal (or no) masking does."""
    tokens: int
    """T, the width of the batch that attention sees."""
    cache: KVCache | None
    packing: Packing | None


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
    if window is not None:
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
        self.prefix = Slot("attention prefix", c.n_kv_heads, c.head_dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        c, n = self.config, self.names
        q, k, v = self.heads(x)  # (B, T, H, K), (B, T, Hkv, K) twice
        if n.q_norm:
            q, k = getattr(self, n.q_norm)(q), getattr(self, n.k_norm)(k)
        form = c.rope if self.window is None or c.rope_local is None else c.rope_local
        if form is not None:
            by = step.rotations[form is c.rope_local]
            if quick(x):
                q, k = rope_ref(torch.cat([q, k], dim=2), *by, form.interleaved).split([c.n_heads, c.n_kv_heads], dim=2)
            else:
                q, k = rope(q, *by, form.interleaved), rope(k, *by, form.interleaved)
        if step.packing is not None:
            q, k, v = step.packing.rows(q), step.packing.rows(k), step.packing.rows(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K), (B, Hkv, T, K) twice
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v)
        mask, causal = step.masks[self.window], k.shape[2] == step.tokens
        if not isinstance(self.prefix, Slot):  # an adapter put keys and values before the first token
            k, v, mask = self.prefixed(x, k, v, mask)
            causal = False
        y = attend(q, k, v, mask, causal, c.attn_scale, c.attn_softcap)  # (B, H, T, K)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H K)
        return getattr(self, n.o)(y if step.packing is None else step.packing.collect(y))  # type: ignore[no-any-return]

    def prefixed(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """P positions before all others, seen by every query: they take part in no rotation and in no window."""
        extra = self.prefix(x).to(k.dtype).transpose(1, 3)  # (B, P, 2, Hkv, K) -> (B, Hkv, 2, P, K)
        T, S, P = x.shape[1], k.shape[2], extra.shape[3]
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)[None, None]
        mask = torch.cat([mask.new_ones(*mask.shape[:3], P), mask], dim=-1)
        k, v = (torch.cat([extra[:, :, i].expand(len(kv), -1, -1, -1), kv], dim=2) for i, kv in enumerate((k, v)))
        return k, v, mask

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = self.config, self.names
        if n.qkv:
            sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
            q, k, v = getattr(self, n.qkv)(x).split(sizes, dim=-1)
        else:
            q, k, v = project(x, getattr(self, n.q), getattr(self, n.k), getattr(self, n.v))
        shape = (*x.shape[:2], -1, c.head_dim)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, softcap: float | None
) -> Tensor:
    """softmax(q kᵀ · scale) v with shared key-value heads.  (B, H, T, K), 2 x (B, Hkv, S, K) -> (B, H, T, K)"""
    B, H, T, K = q.shape
    groups = H // k.shape[1]
    causal = causal and mask is None and T > 1
    if softcap is not None:
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
        return _capped(q, k, v, mask, scale or 1 / math.sqrt(K), softcap)
    if causal and short_attention_pays(q):
        return short_attention(q, k, v, scale or 1 / math.sqrt(K))
    if causal and T >= 128 and q.dtype == torch.bfloat16 and quick(q) and not has_amx():
        return _in_blocks(q, k, v, scale or 1 / math.sqrt(K))
    if T == 1 and groups > 1:  # the heads of a group become queries of one head: no copy of k and v
        y = F.scaled_dot_product_attention(q.reshape(B, -1, groups, K), k, v, attn_mask=mask, scale=scale)
        return y.reshape(B, H, 1, K)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)


@cache
def has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())  # private: it may go


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention in bf16, 64 queries at a time; scores in fp32, their shares rounded, as the library does.

    Without AMX the library's kernel is slower: 8.7 ms against 6.1 for (1, 9, 512, 64), one thread of an AMD EPYC.
    """
    B, H, T, K = q.shape
    q = (q.float() * scale).reshape(-1, H // k.shape[1], T, K)  # (B Hkv, H / Hkv, T, K)
    k, v = k.float().reshape(-1, T, K), v.reshape(-1, T, K)
    y, hidden = v.new_empty(q.shape), torch.full((64, 64), -math.inf, dtype=torch.float32, device=q.device).triu(1)
    for start in range(0, T, 64):
        end = min(start + 64, T)
        scores = (q[:, :, start:end].flatten(1, 2) @ k[:, :end].mT).unflatten(1, (-1, end - start))
        scores[..., start:] += hidden[: end - start, : end - start]
        shares = scores.softmax(-1).to(v.dtype).flatten(1, 2)
        y[:, :, start:end] = (shares @ v[:, :end]).unflatten(1, (-1, end - start))
    return y.view(B, H, T, K)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with scores bent to +-softcap (Gemma 2), which no library kernel has; fp32 from scores to softmax."""
    B, H, T, K = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    scores = (q.reshape(B, kv_heads, -1, K) @ k.mT).float().view(B, kv_heads, -1, T, S)  # (B, Hkv, H / Hkv, T, S)
    scores = softcap * torch.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    return (scores.softmax(dim=-1).to(v.dtype).view(B, kv_heads, -1, S) @ v).view(B, H, T, K)


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
            h = self.gated(gate, up)
        elif n.gate:
            gate, up = project(x, getattr(self, n.gate), getattr(self, n.up))
            h = self.gated(gate, up)
        else:
            h = self.act(getattr(self, n.up)(x))
        return getattr(self, n.down)(h)  # type: ignore[no-any-return]

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.act is F.silu:
            return F.silu(gate).mul_(up) if quick(gate) else swiglu(gate, up)
        return self.act(gate) * up


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
        self.attn_slot, self.mlp_slot = Slot("sublayer", config.dim), Slot("sublayer", config.dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        n = self.names
        h = getattr(self, n.attn_norm)(x)
        y = self.attn_slot(h, getattr(self, n.attn)(h, step))
        x = x + (getattr(self, n.attn_post_norm)(y) if n.attn_post_norm else y)
        h = getattr(self, n.mlp_norm)(x)
        y = self.mlp_slot(h, getattr(self, n.mlp)(h))
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

    takes_virtual_tokens = True  # lengthens mask and positions itself when prompt tuning adds tokens

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

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.family.names.layers)  # type: ignore[return-value]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) -> logits (B, T, V); (B, P + T, V) where prompt tuning puts P virtual tokens before the others."""
        return self.head(self.states(input_ids, attention_mask, position_ids, cache))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D) after the final norm, without virtual tokens. With a cache: mask (B, cached + T)."""
        x = self.states(input_ids, attention_mask, position_ids, cache)
        return x[:, x.shape[1] - input_ids.shape[1] :]

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What `hidden` gives, with the virtual tokens.  (B, T) -> (B, P + T, D)"""
        n, (batch, tokens) = self.family.names, input_ids.shape
        seen = 0 if cache is None else cache.length
        if attention_mask is not None and attention_mask.shape != (batch, seen + tokens):
            raise ValueError(f"attention_mask must be {(batch, seen + tokens)}, got {tuple(attention_mask.shape)}")
        positions = position_ids
        if positions is None:  # 0..T-1 after what is cached
            positions = torch.arange(seen, seen + tokens, device=input_ids.device)[None]
        positions = positions + self.prefix_tokens()
        packing = None
        if attention_mask is not None and seen == 0 and self.packable(attention_mask):
            packing = Packing(attention_mask, align=cache is None)
            input_ids, positions = packing.pack(input_ids), packing.pack(positions.expand(batch, -1))
            attention_mask = None if cache is None else attention_mask
        x = self.get_submodule(n.embed)(input_ids)
        if x.shape[1] > input_ids.shape[1]:  # virtual tokens before the others
            x, attention_mask, positions = with_virtual(x, input_ids, attention_mask, positions, cache)
        if n.positions:
            x = x + self.get_submodule(n.positions)(positions)
        if self.family.embed_scale:
            x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype)  # rounded to x's dtype, as it was trained
        step = self.step(x, attention_mask, positions, cache, packing)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                contexts = partial(checkpoint_contexts, block)
                x = checkpoint(block, x, step, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x, step)
        if cache is not None:
            cache.stored += step.tokens
        x = self.get_submodule(n.norm)(x)
        return x if packing is None else packing.unpack(x, tokens)

    def prefix_tokens(self) -> int:
        """Positions that prefix adapters take before the first token."""
        slots = (getattr(block, self.family.names.attn).prefix for block in self.blocks)
        return max((slot.virtual_tokens() for slot in slots if isinstance(slot, AdaptedLinear)), default=0)

    @property
    def head_weight(self) -> Tensor | None:
        """(V, D) where the logits are hidden @ Wᵀ, softcap aside (a loss may take them in parts), or None."""
        head = self.get_submodule(self.family.names.lm_head)
        return head.weight if type(head) is nn.Linear and head.bias is None else None

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)"""
        logits = self.get_submodule(self.family.names.lm_head)(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)  # type: ignore[no-any-return]

    def step(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, cache: KVCache | None, packing: Packing | None
    ) -> Step:
        """What the layers of this forward share.  x: (B, T, D), or (1, N, D) when it is packed"""
        c, seen = self.config, 0 if cache is None else cache.stored
        tokens = x.shape[1] if packing is None else packing.width
        # the longest row decides between the short and the long form of a stretched rope
        length = seen + tokens if not depends_on_length(c) else int(positions.max()) + 1
        rotations = {
            local: rotation(rope, positions, length)
            for local, rope in ((False, c.rope), (True, c.rope_local))
            if rope is not None
        }
        masks = {w: attention_mask_for(mask, w, tokens, seen, x.device) for w in set(c.windows)}
        return Step(rotations, masks, tokens, cache, packing)

    def packable(self, mask: Tensor) -> bool:
        """Whether padding may be dropped: there is some, and nothing that acts needs the rows of the batch."""
        real = int(mask.sum())
        if not 0 < real < mask.numel():
            return False
        return not any(isinstance(m, AdaptedLinear) and m.needs_rows() for m in self.modules())


def depends_on_length(config: ModelConfig) -> bool:
    return config.rope is not None and config.rope.kind in ("dynamic", "longrope")


def with_virtual(
    x: Tensor, input_ids: Tensor, mask: Tensor | None, positions: Tensor, cache: KVCache | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Make room for P virtual tokens that the embeddings put before the T real ones; once, where there is a cache."""
    P = x.shape[1] - input_ids.shape[1]
    positions = positions + P
    if cache is not None and cache.stored:
        x = x[:, P:]
    else:
        virtual = torch.arange(P, device=x.device)[None].expand(positions.shape[0], -1)
        positions = torch.cat([virtual, positions], dim=1)
        if cache is not None:
            cache.virtual = P
    if mask is not None:
        mask = torch.cat([mask.new_ones(mask.shape[0], P), mask], dim=1)
    return x, mask, positions
