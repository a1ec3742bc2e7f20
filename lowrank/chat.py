"""`lowrank chat`: a conversation with a run's model. For looking, not for serving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.active import activate
from lowrank.data.render import Renderer
from lowrank.models.generate import generate_ids
from lowrank.models.load import load
from lowrank.quant.linear import decoded
from lowrank.training.reopen import reopen


def open_model(source: str) -> tuple[nn.Module, Any]:
    """A run's model with its adapter, or a plain model."""
    if (Path(source) / "config.yaml").is_file():
        return reopen(source)
    model, tokenizer = load(source)
    return model.eval(), tokenizer


def chat(source: str, adapters: Sequence[str] | None, max_new_tokens: int, temperature: float) -> int:
    """Read lines until an empty one or the end of input; each answer sees the conversation so far."""
    model, tokenizer = open_model(source)
    if adapters is not None:
        activate(model, None if list(adapters) in ([], ["none"]) else list(adapters))
    print("an empty line ends the conversation; /new starts another")
    renderer = Renderer(tokenizer)  # the same prompt as in training and evaluation
    with decoded(model):
        return _talk(model, tokenizer, renderer, max_new_tokens, temperature)


def _talk(model: nn.Module, tokenizer: Any, renderer: Renderer, max_new_tokens: int, temperature: float) -> int:
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ids = renderer.conversation_ids(messages)
        new = generate_ids(model, [ids], max_new_tokens, tokenizer.eos_ids, tokenizer.pad_id, temperature)
        answer = tokenizer.decode(new[0]).strip()
        print(answer)
        messages.append({"role": "assistant", "content": answer})
