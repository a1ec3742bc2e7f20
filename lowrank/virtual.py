"""Virtual tokens in a model that is not ours: prompt and p-tuning lengthen what the embeddings give, and the model's
other inputs must follow. Our decoder does this itself (`takes_virtual_tokens`)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import AdaptedLinear


def make_room(model: nn.Module, embedding: AdaptedLinear) -> Any:
    """A hook before `model.forward` that lengthens mask, positions and labels; None where the model needs no help."""
    if getattr(model, "takes_virtual_tokens", False):
        return None
    return model.register_forward_pre_hook(partial(_lengthen, embedding), with_kwargs=True)


def _lengthen(
    embedding: AdaptedLinear, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    P = 0 if embedding.unmerged else embedding.virtual_tokens()
    if P == 0:
        return None
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "prompt tuning with a key-value cache is for lowrank's own models; call this one with use_cache=False"
        )
    if sum(isinstance(arg, Tensor) for arg in args) > 1:
        raise ValueError("with prompt tuning active, pass attention_mask and the other inputs by name")
    kwargs = dict(kwargs)
    for name, value in (("attention_mask", 1), ("labels", -100), ("token_type_ids", 0)):
        given = kwargs.get(name)
        if isinstance(given, Tensor):
            kwargs[name] = torch.cat([given.new_full((len(given), P), value), given], dim=1)
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor):
        virtual = torch.arange(P, device=positions.device).expand(len(positions), -1)
        kwargs["position_ids"] = torch.cat([virtual, positions + P], dim=1)
    return args, kwargs
