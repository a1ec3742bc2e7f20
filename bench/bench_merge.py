"""What a merge keeps of a trained adapter: python -m bench.bench_merge RUN

For each kind of layer the share of the update that survives (1 - |error| / |update|, mean and lowest): in the dense
dtype, in NF4 by plain rounding, and in the layers' outputs on calibration text, plainly rounded and compensated. For
each way of merging the change of the logits on text that no rounding has seen, and on a domain's own questions:
|merged - adapter beside the base| / |adapter beside the base - base|; 100 % loses as much as there was to keep.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import lowrank
from lowrank.active import acting
from lowrank.adapter import adapted_layers
from lowrank.data.render import Renderer
from lowrank.training.material import read_material, render
from lowrank.training.reopen import reopen, run_config

WIDTH = 256


def windows(ids: list[int], count: int) -> Tensor:
    """(count, WIDTH) tokens, one after the other."""
    return torch.tensor(ids[: count * WIDTH]).view(-1, WIDTH)


def by_kind(shares: dict[str, float]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for path, share in shares.items():
        groups.setdefault(path.rsplit(".", 1)[-1], []).append(share)
    return groups


def cell(shares: Iterable[float]) -> str:
    shares = list(shares)
    return f"{sum(shares) / len(shares):.1%} ({min(shares):.1%})" if shares else ""


@torch.no_grad()
def logits(model: Any, batches: list[Tensor]) -> list[Tensor]:
    return [model(ids).float() for ids in batches]


def change(model: Any, batches: list[Tensor], adapted: list[Tensor], base: list[Tensor]) -> str:
    shares = [float((m - a).norm() / (a - b).norm()) for m, a, b in zip(logits(model, batches), adapted, base)]
    return " | ".join(f"{share:.1%}" for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--windows", type=int, default=16, help=f"calibration text, in windows of {WIDTH} tokens")
    arguments = parser.parse_args()
    config = run_config(arguments.run)
    model, tokenizer = reopen(arguments.run)
    material = read_material(config.data, config.train.seed)
    renderer = Renderer(tokenizer, config.data.max_length)
    examples = render(material, renderer, with_general=True)
    # rounding looks at what the model was trained on and at general questions; the prose stays unseen
    pairs = zip(examples.train, [*examples.general, *examples.train])
    calibration = windows([id for pair in pairs for example in pair for id in example.input_ids], arguments.windows)
    asked = [id for record in material.test["paraphrase"] for id in renderer.example(record).input_ids]
    texts = [windows(tokenizer.encode(material.prose), 2), windows(asked, 2)]
    adapted = logits(model, texts)
    with acting(model, None):
        base = logits(model, texts)
    size = sum(p.numel() for _, layer in adapted_layers(model) for p in layer.adapters.parameters())
    print(f"{arguments.run}: {config.adapter.method}, {size:,} parameters, base {config.quantize or config.dtype}\n")
    try:
        lowrank.merge(model, "default", to="nf4")
    except ValueError as error:
        print(f"refused: {error}\n")
    ways = {"dense": lowrank.merge(model, "default")}
    lines = [f"| to {config.dtype} | {change(model, texts, adapted, base)} |"]
    lowrank.unmerge(model)
    ways["nf4"] = lowrank.merge(model, "default", to="nf4", force=True)
    lines.append(f"| to NF4, plain rounding | {change(model, texts, adapted, base)} |")
    lowrank.unmerge(model)
    report = ways["aware"] = lowrank.merge(
        model, "default", to="nf4", force=True, calibration=list(calibration[:, None])
    )
    lines.append(f"| to NF4, compensated | {change(model, texts, adapted, base)} |")
    lowrank.unmerge(model)
    columns = [ways["dense"].dense, ways["nf4"].nf4, report.nearest, report.survival]
    print(
        "| layer | weight, dense | weight, NF4 | output, NF4 plain | output, NF4 compensated |\n"
        + "| --- |"
        + " ---: |" * 4
    )
    for kind in by_kind(report.survival):
        print(f"| {kind} | " + " | ".join(cell(by_kind(column)[kind]) for column in columns) + " |")
    print("| all | " + " | ".join(cell(column.values()) for column in columns) + " |")
    print("\n| merged | logits off, general prose | logits off, the domain's questions |\n| --- | ---: | ---: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
