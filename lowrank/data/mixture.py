"""Domain and general examples in one stream.

General examples are there against forgetting; their share is counted in tokens, because that is what the model reads.
"""

import random
from collections.abc import Sequence

from lowrank.data.render import Example


def mix(domain: Sequence[Example], general: Sequence[Example], share: float, seed: int = 0) -> list[Example]:
    """All of `domain` once, and of `general` so many that they make `share` of all tokens.

    The general ones are taken in an order that the seed fixes, again from the start where there are too few. Raises
    ValueError where a share is asked for and there are none.
    """
    if share <= 0:
        return list(domain)
    if not general:
        raise ValueError("data.general_share asks for general examples and there are none; set it to 0")
    wanted = share / (1 - share) * sum(len(example.input_ids) for example in domain)
    order = random.Random(seed).sample(range(len(general)), len(general))
    chosen: list[Example] = []
    tokens = 0
    while tokens < wanted:
        example = general[order[len(chosen) % len(order)]]
        chosen.append(example)
        tokens += len(example.input_ids)
    return [*domain, *chosen]
