"""Batches: padding, splits, the order that a seed fixes, and resuming it."""

import pytest
import torch

from lowrank.data.batches import Loader, collate, split
from lowrank.data.mixture import mix
from lowrank.data.render import IGNORE, Example


def examples(count: int, seed: int = 0) -> list[Example]:
    lengths = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example([i + 1] * n, [IGNORE, *[i + 1] * (n - 1)], str(i)) for i, n in enumerate(lengths)]


def ids(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["input_ids"][:, 0] - 1).tolist()


def test_padding_is_on_the_right_and_carries_no_label() -> None:
    batch = collate([Example([5, 6], [IGNORE, 6]), Example([7, 8, 9], [IGNORE, 8, 9])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 8, 9]]


def test_held_rows_have_a_teacher_and_no_labels() -> None:
    batch = collate([Example([5, 6], [IGNORE, 6]), Example([7, 8], [IGNORE, 8], teacher=torch.ones(2, 4))], pad_id=0)
    assert batch["labels"].tolist() == [[IGNORE, 6], [IGNORE, IGNORE]]
    assert batch["kl_mask"].tolist() == [[False, False], [True, True]]
    assert batch["teacher"].shape == (2, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_split_keeps_every_token_and_teacher_state(size: int) -> None:
    rows = [
        Example([i] * n, [IGNORE] * n, teacher=torch.full((n, 2), i) if i % 2 else None)
        for i, n in enumerate([3, 5, 2, 7, 4])
    ]
    whole = collate(rows, pad_id=9)
    parts = split(whole, size)
    states = torch.cat([part["teacher"] for part in parts if "teacher" in part])
    assert torch.equal(states, whole["teacher"])
    for part in parts:
        assert part["attention_mask"].any(0).all()  # cut to its own longest row
        if "kl_mask" in part:
            assert int(part["kl_mask"].sum()) == len(part["teacher"])
    assert sum(int(part["attention_mask"].sum()) for part in parts) == int(whole["attention_mask"].sum())


def test_each_pass_has_every_example_once_in_an_order_of_its_own() -> None:
    loader = Loader(examples(53), batch_size=4, pad_id=0, seed=3)
    passes = [[i for _ in range(loader.batches_per_epoch) for i in ids(loader.next())] for _ in range(2)]
    assert all(sorted(order) == list(range(53)) for order in passes)
    assert passes[0] != passes[1]
    again = Loader(examples(53), batch_size=4, pad_id=0, seed=3)
    assert [i for _ in range(again.batches_per_epoch) for i in ids(again.next())] == passes[0]
    other = Loader(examples(53), batch_size=4, pad_id=0, seed=4)
    assert [i for _ in range(other.batches_per_epoch) for i in ids(other.next())] != passes[0]


def test_batches_are_of_like_size() -> None:
    loader = Loader(examples(512), batch_size=16, pad_id=0)
    sizes = [int(loader.next()["attention_mask"].sum()) for _ in range(loader.batches_per_epoch)]
    # dealt to and fro, two batches of a window differ by at most one longest step in a pair of turns; windows by chance
    assert max(sizes) - min(sizes) < 0.2 * sum(sizes) / len(sizes)


@pytest.mark.parametrize("after", [0, 3, 14, 20])
def test_a_resumed_loader_goes_on_where_it_was(after: int) -> None:
    first, second = (Loader(examples(53), batch_size=4, pad_id=0, seed=1) for _ in range(2))
    for _ in range(after):
        first.next()
    second.load_state_dict(first.state_dict())
    assert [ids(first.next()) for _ in range(20)] == [ids(second.next()) for _ in range(20)]


def test_a_state_of_other_data_is_refused() -> None:
    state = Loader(examples(53), batch_size=4, pad_id=0).state_dict()
    with pytest.raises(ValueError, match="the data had examples=53 and has 52 now"):
        Loader(examples(52), batch_size=4, pad_id=0).load_state_dict(state)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        Loader([], batch_size=4, pad_id=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Loader(examples(3), batch_size=0, pad_id=0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_general_share_is_counted_in_tokens(share: float) -> None:
    domain, general = examples(200), examples(30, seed=1)
    mixed = mix(domain, general, share, seed=0)
    tokens = [len(example.input_ids) for example in mixed]
    assert mixed[:200] == domain
    assert abs(sum(tokens[200:]) / sum(tokens) - share) < 40 / sum(tokens)  # one example too many at most
    assert mix(domain, [], 0.0) == domain
    with pytest.raises(ValueError, match="there are none"):
        mix(domain, [], share)
