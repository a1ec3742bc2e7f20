"""The one way from a record to tokens, for training, evaluation and chat.

A conversation is rendered by the chat template; each stretch that the model has to write is tokenised by itself, behind
exactly the tokens that generation starts from. So the loss mask cannot be off at a token boundary, and training and
generation see the same prompt.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Protocol

from lowrank.data.records import Record

IGNORE = -100  # a label that carries no loss, as in torch's cross_entropy


class Tokenizer(Protocol):
    @property
    def eos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> Set[int]: ...
    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class Example:
    """One training example. labels[t] is input_ids[t] where the model has to write it, IGNORE elsewhere."""

    input_ids: list[int]
    labels: list[int]
    id: str = ""
    kind: str = "qa"
    teacher: Any = None
    """Final hidden states (T, D) of the teacher, where the loss is KL to it at every position; else None."""


@dataclass(frozen=True)
class Renderer:
    tokenizer: Tokenizer
    max_length: int = 512

    def prompt_ids(self, record: Record) -> list[int]:
        """The question, ready for the model to answer: everything before the record's last assistant turn."""
        messages = record.conversation()
        return self.conversation_ids(messages[:-1] if messages[-1]["role"] == "assistant" else messages)

    def conversation_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation that ends with the user, followed by the start of the assistant's turn."""
        return self._ids(self._prompt(messages), first=True)

    def example(self, record: Record) -> Example:
        """The whole record, loss on what the assistant says and on the token that ends it.

        Raises ValueError where the record has no answer, or where no answer token lies within max_length.
        """
        messages = record.conversation()
        where = f"record {record.id or record.instruction[:40]!r}"
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{where} has no answer to learn from: it needs 'output' or an assistant message at the end"
            )
        ids: list[int] = []
        labels: list[int] = []
        done = ""  # the text that ids and between stand for
        between: list[int] = []  # what the template writes behind an answer: read before the next turn, never learned
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, full = self._texts(messages[: i + 1], where)
            if not prompt.startswith(done):
                raise ValueError(f"{where}: the chat template rewrites earlier turns, so the answers cannot be masked")
            question = self._ids(prompt[len(done) :], first=not done)
            answer, behind = self._answer_ids(full[len(prompt) :])
            ids += between + question + answer
            labels += [IGNORE] * len(between + question) + answer
            done, between = full, behind
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE for label in labels[1:]):
            raise ValueError(
                f"{where}: all labels are masked: the question alone fills data.max_length={self.max_length} tokens;"
                " raise data.max_length or shorten the record"
            )
        return Example(ids, labels, record.id, record.kind)

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        """The text up to the start of the assistant's turn; without a template the turns, one a paragraph."""
        if self.tokenizer.chat_template is None:
            return "".join(f"{message['content']}\n" for message in messages)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def _texts(self, messages: list[dict[str, str]], where: str) -> tuple[str, str]:
        """(text up to the last answer, text with it)."""
        prompt = self._prompt(messages[:-1])
        if self.tokenizer.chat_template is None:
            return prompt, prompt + messages[-1]["content"]
        full = self.tokenizer.apply_chat_template(messages)
        if not full.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template does not continue its own generation prompt; choose another data.template"
            )
        return prompt, full

    def _ids(self, text: str, first: bool = False) -> list[int]:
        """A template's text holds its special tokens; a plain one gets the tokenizer's own where it is the `first`."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(text, add_special=first)
        return self.tokenizer.encode(text, parse_special=True)

    def _answer_ids(self, text: str) -> tuple[list[int], list[int]]:
        """The answer with its end token, and what the template writes behind it (a line break)."""
        ids = self._ids(text)
        ends = [i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids]
        if ends:
            return ids[: ends[-1] + 1], ids[ends[-1] + 1 :]
        return ([*ids, self.tokenizer.eos_id] if self.tokenizer.eos_id is not None else ids), []
