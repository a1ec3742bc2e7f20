"""BERT (Devlin et al., 2018), arXiv:1810.04805: an encoder and its heads, under the checkpoint's own module paths.

    x = norm(word + position + token type)             B batch   T tokens   D dim   H heads   K head dim
    x = norm(x + attention(x))    for each layer       F MLP dim   C classes   V vocabulary
    x = norm(x + mlp(x))

Heads: "embed" gives x itself, "mlm" (B, T, V), "tokens" (B, T, C), "sequence" and "regression" (B, C).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.active import checkpoint_contexts
from lowrank.adapter import Slot, project
from lowrank.models.decoder import ACTIVATIONS, place
from lowrank.models.families import ModelConfig, family_of


class Embeddings(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.position_embeddings = nn.Embedding(c.max_positions, c.dim)
        self.token_type_embeddings = nn.Embedding(c.token_types, c.dim)
        self.LayerNorm = nn.LayerNorm(c.dim, eps=c.norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, D)"""
        T, most = input_ids.shape[1], self.position_embeddings.num_embeddings
        if most < T:
            raise ValueError(f"the input has {T} tokens, the model has {most} positions; cut the input")
        positions = torch.arange(T, device=input_ids.device)[None] if position_ids is None else position_ids
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        return self.LayerNorm(x + self.position_embeddings(positions))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.query, self.key, self.value = (nn.Linear(c.dim, c.dim) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(shape).transpose(1, 2) for y in project(x, self.query, self.key, self.value))  # (B, H, T, K)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """norm(x + W h): how each half of a layer ends."""

    def __init__(self, in_features: int, c: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, c.dim)
        self.LayerNorm = nn.LayerNorm(c.dim, eps=c.norm_eps)

    def forward(self, h: Tensor, x: Tensor, slot: nn.Module) -> Tensor:
        return self.LayerNorm(x + slot(x, self.dense(h)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        place(self, "attention.self", SelfAttention(c))
        place(self, "attention.output", Output(c.dim, c))
        place(self, "intermediate.dense", nn.Linear(c.dim, c.hidden_dim))
        self.output = Output(c.hidden_dim, c)
        self.attn_slot, self.mlp_slot = Slot("sublayer", c.dim), Slot("sublayer", c.dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        attention: Any = self.attention
        x = attention.output(attention.self(x, mask), x, self.attn_slot)
        return self.output(self.act(self.intermediate.dense(x)), x, self.mlp_slot)  # type: ignore[no-any-return, union-attr, operator]


class Encoder(nn.Module):
    """BERT with the head that its configuration names. `checkpointing = True` recomputes each layer in backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.family = config, family_of(config)
        self.checkpointing = False
        self.origin: Any = None
        c = config
        place(self, "bert.embeddings", Embeddings(c))
        place(self, "bert.encoder.layer", nn.ModuleList(Layer(c) for _ in range(c.n_layers)))
        if c.head == "mlm":
            place(self, "cls.predictions.transform.dense", nn.Linear(c.dim, c.dim))
            place(self, "cls.predictions.transform.LayerNorm", nn.LayerNorm(c.dim, eps=c.norm_eps))
            self.cls.predictions.register_parameter("bias", nn.Parameter(torch.empty(c.vocab_size)))  # type: ignore[union-attr, operator]
        elif c.head != "embed":
            if c.head in ("sequence", "regression"):
                place(self, "bert.pooler.dense", nn.Linear(c.dim, c.dim))
            self.classifier = nn.Linear(c.dim, len(c.labels))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: None = None,
    ) -> Tensor:
        """(B, T) -> the head's logits; the "embed" head gives the last hidden states (B, T, D)."""
        return self.head(self.hidden(input_ids, attention_mask, position_ids, token_type_ids))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D)"""
        bert: Any = self.bert
        x = bert.embeddings(input_ids, position_ids, token_type_ids)
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # a row of padding alone gives no nan
            mask = attention_mask.bool()[:, None, None, :] | own  # (B, 1, T, T)
        for layer in bert.encoder.layer:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, use_reentrant=False, context_fn=partial(checkpoint_contexts, layer))
            else:
                x = layer(x, mask)
        return x  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> what the head gives"""
        bert: Any = self.bert
        if self.config.head == "embed":
            return hidden
        if self.config.head == "tokens":
            return self.classifier(hidden)  # type: ignore[no-any-return]
        if self.config.head == "mlm":
            predictions: Any = self.cls.predictions  # type: ignore[union-attr]
            transform = predictions.transform
            h = transform.LayerNorm(ACTIVATIONS[self.config.activation](transform.dense(hidden)))
            return F.linear(h, bert.embeddings.word_embeddings.weight, predictions.bias)
        return self.classifier(torch.tanh(bert.pooler.dense(hidden[:, 0])))  # type: ignore[no-any-return]
