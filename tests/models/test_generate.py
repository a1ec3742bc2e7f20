"""Generation: one prompt or many, greedy or sampled, the same tokens."""

import pytest
import torch
from torch import nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.prefix import PrefixConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.models.generate import Sampler, before_stop, ends_at, generate, generate_ids

PROMPTS = [[5, 9, 33], [101], [7, 7, 12, 80, 41, 17, 3], [64, 65]]


def test_a_padded_batch_gives_what_single_prompts_give(tiny: nn.Module) -> None:
    single = [generate_ids(tiny, [prompt], 20)[0] for prompt in PROMPTS]
    assert generate_ids(tiny, PROMPTS, 20) == single and all(len(answer) == 20 for answer in single)


def test_an_end_stops_its_row_and_no_other(tiny: nn.Module) -> None:
    free = generate_ids(tiny, PROMPTS, 20)
    ends = {free[0][4], free[2][9]}
    wanted = [row[: next((i for i, id in enumerate(row) if id in ends), 20)] for row in free]
    done: list[int] = []
    assert generate_ids(tiny, PROMPTS, 20, ends, on_progress=done.append) == wanted
    assert done == sorted(done) and done[-1] == len(PROMPTS)


def test_many_rows_leave_the_batch_in_eights(tiny: nn.Module) -> None:
    free = generate_ids(tiny, PROMPTS, 20)
    ends = {free[0][4], free[2][9], free[1][2]}
    wanted = [row[: next((i for i, id in enumerate(row) if id in ends), 20)] for row in free]
    assert len({len(row) for row in wanted}) > 2
    assert generate_ids(tiny, PROMPTS * 6, 20, ends) == wanted * 6


def test_rows_keep_their_adapters_when_others_are_done(tiny: nn.Module) -> None:
    lowrank.attach(tiny, LoRAConfig(rank=4))
    free = generate_ids(tiny, PROMPTS * 4, 20)
    with lowrank.rows(tiny, ["default", None] * 8):
        answers = generate_ids(tiny, PROMPTS * 4, 20, {row[3] for row in free[:3]})
    lowrank.detach(tiny)
    assert len({len(row) for row in answers}) > 1


def test_sampling_is_exact_by_seed_and_row_i_draws_from_seed_plus_i(tiny: nn.Module) -> None:
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    batch = generate_ids(tiny, PROMPTS, 12, seed=3, **options)
    assert batch == generate_ids(tiny, PROMPTS, 12, seed=3, **options)
    assert batch != generate_ids(tiny, PROMPTS, 12, seed=4, **options)
    assert [generate_ids(tiny, [p], 12, seed=3 + i, **options)[0] for i, p in enumerate(PROMPTS)] == batch


def test_top_k_and_top_p_cut_the_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])  # probabilities 0.03 0.64 0.24 0.09

    def seen(**options: float) -> set[int]:
        sampler = Sampler(1.0, **{"top_k": 0, "top_p": 1.0, **options}, generators=[torch.Generator().manual_seed(0)])
        return {sampler(logits, [0])[0] for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 2}
    assert seen(top_p=0.6) == {1} and seen(top_p=0.7) == {1, 2}


def test_repetition_penalty_is_the_one_of_the_paper() -> None:
    """Positive logits of known tokens are divided, negative ones multiplied; others stay."""
    sampler = Sampler(0.0, 0, 1.0, [torch.Generator()], penalty=2.0)
    sampler.read([[0, 3]])
    logits = torch.tensor([[4.0, 1.9, -1.0, -0.5]])
    assert sampler(logits, [0]) == [0] and logits[0, 0] == 4  # 4 / 2 = 2 is still the largest; the input is untouched
    logits[0, 1] = 2.1
    assert sampler(logits, [0]) == [1] and sampler.known == [{0, 1, 3}]
    assert sampler(torch.tensor([[-9.0, -9.0, -0.9, -0.5]]), [0]) == [2]  # -0.5 counts as -1


def test_penalised_rows_are_what_single_prompts_give(tiny: nn.Module) -> None:
    """Padding counts as no token, and rows that leave the batch keep their own history."""
    single = [generate_ids(tiny, [p], 20, repetition_penalty=1.3)[0] for p in PROMPTS]
    assert generate_ids(tiny, PROMPTS, 20, pad_id=single[0][0], repetition_penalty=1.3) == single
    assert single != generate_ids(tiny, PROMPTS, 20)
    assert all(len(set(answer)) == 20 for answer in generate_ids(tiny, PROMPTS, 20, repetition_penalty=1e9))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2}])
def test_samples_are_the_rows_of_the_prompt_repeated(tiny: nn.Module, options: dict) -> None:
    """One reading of each prompt serves all its samples; the seeds are those of the rows."""
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    read: list[int] = []
    tiny.model.embed_tokens.register_forward_hook(lambda module, args, y: read.append(args[0].shape[0]))
    answers = generate_ids(tiny, PROMPTS, 9, seed=5, samples=3, **options)
    assert read[0] in (1, len(PROMPTS)) and set(read[1:]) == {3 * len(PROMPTS)}
    assert answers == generate_ids(tiny, repeated, 9, seed=5, **options)
    assert len({tuple(answer) for answer in answers[:3]}) == (3 if options else 1)


class Words:
    """Ids are words; the least that `generate` needs of a tokenizer."""

    eos_ids, pad_id, eos_id = frozenset(), 0, None

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"w{i} " for i in ids)


def test_stop_strings_end_a_row_and_are_left_out(tiny: nn.Module) -> None:
    words = Words()
    free = generate(tiny, words, ["w5 w9 w33", "w101"], max_new_tokens=12)
    stop = " ".join(free[0].split()[3:5])  # across two tokens
    steps: list[tuple[int, int]] = []
    ids = generate_ids(
        tiny, [[5, 9, 33], [101]], 12, ended=ends_at(words, [stop]), on_token=lambda *new: steps.append(new)
    )
    assert len(ids[0]) == 5 and [id for row, id in steps if row == 0] == ids[0]
    texts = generate(tiny, words, ["w5 w9 w33", "w101"], max_new_tokens=12, stop=[stop])
    assert texts == [before_stop(free[0], [stop]), before_stop(free[1], [stop])] and stop not in texts[0]
    assert generate(tiny, words, "w101", max_new_tokens=2, samples=2) == [" ".join(free[1].split()[:2]) + " "] * 2
    with pytest.raises(ValueError, match="at least one character"):
        ends_at(words, ["a", ""])


def test_samples_inside_rows_are_refused(tiny: nn.Module) -> None:
    lowrank.attach(tiny, LoRAConfig(rank=4))
    with lowrank.rows(tiny, ["default"]), pytest.raises(ValueError, match=r"inside rows\(\): just one"):
        generate_ids(tiny, [[5]], 2, samples=2)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}])
def test_bad_settings(tiny: nn.Module, options: dict) -> None:
    with pytest.raises(ValueError, match="wanted temperature >= 0"):
        generate_ids(tiny, PROMPTS, 2, **options)


def test_nothing_to_do_and_an_empty_prompt(tiny: nn.Module) -> None:
    assert generate_ids(tiny, [], 5) == [] and generate_ids(tiny, PROMPTS, 0) == [[]] * 4
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate_ids(tiny, [[1], []], 5)


def test_training_mode_is_left_as_it_was(tiny: nn.Module) -> None:
    tiny.train()
    generate_ids(tiny, PROMPTS, 1)
    assert tiny.training


@pytest.mark.parametrize("config", [PromptConfig(tokens=3), PrefixConfig(tokens=3)])
def test_virtual_tokens_are_counted_once(tiny: nn.Module, config: object) -> None:
    """With a cache, token by token, the same answer as from the whole sequence each time."""
    lowrank.attach(tiny, config)
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(tiny(torch.tensor([ids]))[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert generate_ids(tiny, PROMPTS, 8) == wanted
