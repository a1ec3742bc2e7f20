"""`lowrank chat`: a conversation with a run's model, word by word as it is written. For looking, not for serving."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.active import activate
from lowrank.adapter import adapter_names
from lowrank.data.render import Renderer
from lowrank.errors import unknown
from lowrank.models.generate import before_stop, ends_at, generate_ids
from lowrank.models.load import load
from lowrank.quant.linear import decoded
from lowrank.store import load_adapter
from lowrank.training.contract import GREEDY, contract, warn_of_differences
from lowrank.training.reopen import reopen


def open_model(source: str) -> tuple[nn.Module, Any]:
    """A run's model with its adapter, or a plain model."""
    if (Path(source) / "config.yaml").is_file():
        return reopen(source)
    model, tokenizer = load(source)
    if tokenizer is None:
        raise FileNotFoundError(f"{source} comes without a tokenizer, so it cannot be talked to")
    return model.eval(), tokenizer


def put_on(model: nn.Module, adapters: Sequence[str]) -> None:
    """Let these act together: names on the model, adapter folders or other runs' folders; `none` is the base."""
    names = []
    for word in adapters:
        folder = Path(word) / "adapter" if (Path(word) / "adapter").is_dir() else Path(word)
        if word in adapter_names(model):
            names.append(word)
        elif folder.is_dir():
            names.append(load_adapter(model, folder))
        elif word != "none":
            raise unknown("adapter (no such name, no such folder)", word, [*adapter_names(model), "none"])
    activate(model, names or None)


def chat(source: str, adapters: Sequence[str] | None, given: dict[str, Any]) -> int:
    """Read lines until an empty one or the end of input; each answer sees the conversation so far.

    `given` are the generation settings that the user chose; the others are those that the adapter was trained with.
    """
    model, tokenizer = open_model(source)
    if adapters is not None:
        put_on(model, adapters)
    chosen = {key: value for key, value in given.items() if value is not None}
    if adapters != ["none"]:
        warn_of_differences(source, **chosen)
    room = {"max_new_tokens": max(128, contract(source).get("max_new_tokens", 0))}  # a conversation is no quiz
    asked = {**GREEDY, **contract(source), **room, **chosen}
    print("an empty line ends the conversation; /new starts another")
    with decoded(model):
        return _talk(model, tokenizer, asked)


def _talk(model: nn.Module, tokenizer: Any, asked: dict[str, Any]) -> int:
    renderer = Renderer(tokenizer)  # the same prompt as in training and evaluation
    settings = {key: asked[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
    opening = [{"role": "system", "content": asked["system"]}] if asked["system"] else []
    messages, stop = list(opening), asked["stop"]
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        if line == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        show = Shown(tokenizer.decode, stop, sys.stdout.write)
        generate_ids(
            model,
            [renderer.conversation_ids(messages)],
            asked["max_new_tokens"],
            tokenizer.eos_ids,
            tokenizer.pad_id,
            seed=asked.get("seed", 0) + len(messages),
            ended=ends_at(tokenizer, stop),
            on_token=show,
            **settings,
        )
        messages.append({"role": "assistant", "content": show.end()})
        print()


class Shown:
    """The text of a growing answer, written when it is certain: whole characters, no beginning of a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], write: Callable[[str], Any]) -> None:
        self.decode, self.stop, self.write = decode, stop, write
        self.ids: list[int] = []
        self.held = max((len(s) - 1 for s in stop), default=0)
        self.done = 0  # characters that are written

    def __call__(self, row: int, id: int) -> None:
        self.ids.append(id)
        text = self._text().rstrip("\ufffd")  # half a character
        self._write(text[: len(text) - self.held].rstrip())

    def _text(self) -> str:
        return before_stop(self.decode(self.ids), self.stop).lstrip()

    def _write(self, text: str) -> None:
        self.write(text[self.done :])
        sys.stdout.flush()
        self.done = max(self.done, len(text))

    def end(self) -> str:
        """Write what was held back; the whole answer."""
        text = self._text().rstrip()
        self._write(text)
        return text
