"""Text generation: batched, left-padded, with a cache of keys and values allocated once.

Rows that are finished leave the batch, eight at a time: leaving copies the cache of those that stay, and each new size
of the batch costs memory (see packing.py).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import carried
from lowrank.models.decoder import KVCache, positions_from_mask
from lowrank.models.one_row import one_row
from lowrank.models.packing import rounded_up
from lowrank.models.tokenizer import Tokenizer
from lowrank.quant.linear import decoded

Messages = list[dict[str, Any]]


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt_or_messages: str | Messages | Sequence[str | Messages],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    samples: int = 1,
) -> Any:
    """The text that follows a prompt (a string: raw text) or a conversation (message dictionaries: the chat template).

    A list of prompts gives a list; `samples` above 1 gives a list of that many for each prompt. The result leaves out
    the prompt and special tokens and ends before the first of the `stop` strings. Greedy at temperature 0.
    """
    single = isinstance(prompt_or_messages, str) or (
        bool(prompt_or_messages) and isinstance(prompt_or_messages[0], dict)
    )
    prompts: Any = [prompt_or_messages] if single else prompt_or_messages
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ended, penalty = ends_at(tokenizer, stop), repetition_penalty
    answers = generate_ids(
        model, ids, max_new_tokens, tokenizer.eos_ids, tokenizer.pad_id, temperature, top_k, top_p, seed, penalty,
        samples, ended,
    )  # fmt: skip
    texts: list[Any] = [before_stop(tokenizer.decode(answer), stop) for answer in answers]
    if samples > 1:
        texts = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return texts[0] if single else texts


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def ends_at(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Whether new ids hold one of the stop strings; None where there are none."""
    if not all(stop):
        raise ValueError(f"a stop string must have at least one character, got {list(stop)}")
    reach = max((len(s.encode()) for s in stop), default=0) + 8  # a token stands for one byte at least

    def ended(ids: list[int]) -> bool:
        tail = tokenizer.decode(ids[-reach:])
        return any(s in tail for s in stop)

    return ended if stop else None


def prompt_ids(tokenizer: Tokenizer, prompt: str | Messages) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special=True)
    return tokenizer.encode(tokenizer.apply_chat_template(prompt, add_generation_prompt=True), parse_special=True)


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    pad_id: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    samples: int = 1,
    ended: Callable[[list[int]], bool] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New ids for each prompt, without the EOS that ends them; `samples` rows a prompt, which share its cache's making.

    Row i draws from its own generator, seeded seed + i. A row also ends where `ended` says so of its new ids.
    `on_progress` is called after each step with the number of finished rows, `on_token` with (row, id) of a new token.
    """
    if samples < 1 or (samples > 1 and carried(model).selection.now.rows is not None):
        raise ValueError(f"wanted one sample a prompt or more (inside rows(): just one), got {samples}")
    answers: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    if not prompts or max_new_tokens < 1:
        return answers
    if model.config.head != "causal":  # type: ignore[union-attr]
        raise ValueError("an encoder does not generate text; load a causal language model")
    if not all(prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no tokens; generation needs at least one")
    embedding: Tensor = model.get_submodule(model.family.names.embed).weight  # type: ignore[union-attr, assignment, arg-type]
    device, width = embedding.device, max(map(len, prompts))
    ids, mask = left_padded(prompts, pad_id or 0, max_new_tokens, device)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, embedding.dtype, device)  # type: ignore[arg-type]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(answers))]
    sample = Sampler(temperature, top_k, top_p, generators, repetition_penalty)
    ends = frozenset(eos_ids)
    rows, done = list(range(len(answers))), [False] * len(answers)  # the answer that each row of the batch writes
    positions = positions_from_mask(mask[:, :width])
    training = model.training
    model.eval()
    try:
        with decoded(model), one_row(model, len(answers), width + max_new_tokens) as steps:
            hidden = model.hidden(ids, mask[:, :width], positions, cache)[:, -1]  # type: ignore[operator]
            if samples > 1:
                each = torch.arange(len(prompts), device=device).repeat_interleave(samples)
                cache.keep(each)
                hidden, positions, mask = hidden[each], positions[each], mask[each]
            sample.read([prompt for prompt in prompts for _ in range(samples)])
            logits = model.head(hidden)  # type: ignore[operator]
            for step in range(max_new_tokens):
                chosen = sample(logits, rows)
                for row, id in zip(rows, chosen):
                    done[row] = done[row] or id in ends
                    if not done[row]:
                        answers[row].append(id)
                        done[row] = ended is not None and ended(answers[row])
                        if on_token is not None:
                            on_token(row, id)
                if on_progress is not None:
                    on_progress(sum(done) if step + 1 < max_new_tokens else len(answers))
                if all(done) or step + 1 == max_new_tokens:
                    break
                if steps is not None:
                    logits = steps(cache, chosen[0])
                    continue
                positions = positions[:, -1:] + 1
                alive = [i for i, row in enumerate(rows) if not done[row]]
                if rounded_up(len(alive), 8) < len(rows) and carried(model).selection.now.rows is None:
                    alive = sorted(alive + [i for i in range(len(rows)) if done[rows[i]]][: -len(alive) % 8])
                    keep = torch.tensor(alive, device=device)
                    cache.keep(keep)
                    positions, mask, rows, chosen = (
                        positions[keep],
                        mask[keep],
                        [rows[i] for i in alive],
                        [chosen[i] for i in alive],
                    )
                last = torch.tensor(chosen, device=device)[:, None]
                hidden = model.hidden(last, mask[:, : cache.length + 1], positions, cache)[:, -1]  # type: ignore[operator]
                logits = model.head(hidden)  # type: ignore[operator]
    finally:
        model.train(training)
    return answers


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, room: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with padding on the left, and their mask with `room` ones behind it (B, T + room)."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), width + room, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class Sampler:
    """Greedy, or a draw from the softmax cut to the `top_k` likeliest and to the nucleus that holds `top_p`.

    Before that, `repetition_penalty` divides the positive and multiplies the negative logits of every token that the
    row has read or written (Keskar et al., 2019, arXiv:1909.05858).
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, generators: list[torch.Generator], penalty: float = 1.0
    ) -> None:
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or penalty <= 0:
            raise ValueError(
                "wanted temperature >= 0, top_k >= 0, 0 < top_p <= 1 and repetition_penalty > 0, got "
                f"{temperature}, {top_k}, {top_p} and {penalty}"
            )
        self.temperature, self.top_k, self.top_p, self.generators = temperature, top_k, top_p, generators
        self.penalty, self.known = penalty, [set[int]() for _ in generators]  # what each row has read or written

    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts' tokens count as said, padding does not."""
        self.known = [set(prompt) for prompt in prompts]

    def __call__(self, logits: Tensor, rows: list[int]) -> list[int]:
        """One id for each row of logits (B, V)."""
        if self.penalty == 1:
            return self.choose(logits.float(), rows)
        logits = logits.float().clone()
        for i, row in enumerate(rows):
            said = torch.tensor(sorted(self.known[row]), dtype=torch.long, device=logits.device)
            x = logits[i, said]
            logits[i, said] = torch.where(x < 0, x * self.penalty, x / self.penalty)
        chosen = self.choose(logits, rows)
        for row, id in zip(rows, chosen):
            self.known[row].add(id)
        return chosen

    def choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        if self.temperature == 0:
            return logits.argmax(dim=-1).tolist()  # type: ignore[no-any-return]
        p = (logits / self.temperature).softmax(dim=-1).cpu()
        order = p.sort(dim=-1, descending=True)
        p = order.values
        if self.top_k:
            p[:, self.top_k :] = 0
        if self.top_p < 1:
            p[p.cumsum(dim=-1) - p >= self.top_p * p.sum(dim=-1, keepdim=True)] = 0  # what lies behind the nucleus
        drawn = torch.stack([torch.multinomial(p[i], 1, generator=self.generators[row]) for i, row in enumerate(rows)])
        return order.indices.gather(1, drawn)[:, 0].tolist()  # type: ignore[no-any-return]
