"""What is proved of the adapters, as Markdown: python -m bench.proofs

The theorems of `lowrank adapters test` for every method, and PEFT's own folders (tests/fixtures/adapters): the largest
difference of logits to what PEFT computed, with the adapter beside the base and merged into it.
"""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

import lowrank
from lowrank.adapter import METHODS
from lowrank.conformance import check
from lowrank.targets import attachments

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


def proofs() -> None:
    print("| method | place | states | proved | do not apply | fail |\n| --- | --- | --- | ---: | ---: | ---: |")
    for name, method in sorted(METHODS.items()):
        states = [word for word in ("mergeable", "identity_at_init", "edits_base") if getattr(method, word)]
        counts = [sum(verdict.holds is kind for verdict in check(method)) for kind in (True, None, False)]
        print(f"| {name} | {method.place} | {', '.join(states)} | {' | '.join(map(str, counts))} |")


@torch.no_grad()
def parity() -> None:
    ids = load_file(FIXTURES / "adapters" / "inputs.safetensors")["input_ids"]
    print("\n| PEFT's folder | read as | logits off | merged |\n| --- | --- | ---: | ---: |")
    for folder in sorted(path.parent for path in (FIXTURES / "adapters").glob("*/adapter_config.json")):
        model = lowrank.load(FIXTURES / "models" / "llama", dtype=torch.float32, progress=False)[0].eval()
        if (residual := folder / "residual.safetensors").is_file():  # PiSSA's was trained on its own base
            for key, value in load_file(residual).items():
                model.get_parameter(key.removeprefix("base_model.model.").replace(".base_layer", "")).copy_(value)
        name = lowrank.load_adapter(model, folder)
        expected = load_file(folder / "expected.safetensors")
        off = [float((model(ids)[:, 3::4] - expected["input_ids"]).abs().max())]
        if "merged_input_ids" in expected:
            lowrank.merge(model, name)
            off.append(float((model(ids)[:, 3::4] - expected["merged_input_ids"]).abs().max()))
        cells = [f"{value:.0e}" for value in off] + [""] * (2 - len(off))
        print(f"| {folder.name} | {attachments(model)[name].method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the raw PiSSA folder says that it needs its own base
        proofs()
        parity()
