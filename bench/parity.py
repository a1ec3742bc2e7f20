"""Every family against the reference implementation: the largest differences.  python -m bench.parity

The expected values in tests/fixtures come from transformers 5.23.0 in fp32 on a CPU (ChatGLM: the published model code
under 4.41.2); the reference's own fp32 and fp64 results differ by up to 1.1e-5. Gradient norms are compared by
parameter, as a share of the largest one. The last row is the quickstart's model, where it is cached: real weights,
log-likelihoods of tokens. Prints a Markdown table.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank.models.families import config_from_json
from lowrank.models.fetch import MODEL, cache_folder
from lowrank.models.generate import generate_ids
from lowrank.models.load import load

MODELS = Path(__file__).parent.parent / "tests" / "fixtures" / "models"
COLUMNS = ("logits", "padded right", "padded left", "loss", "gradient norms", "greedy tokens", "both spellings")


def opened(folder: Path) -> nn.Module:
    return load(folder, dtype=torch.float32, device="cpu", progress=False)[0]


def difference(got: Tensor, wanted: Tensor, mask: Tensor | None = None) -> float:
    if mask is not None:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    return float((got - wanted).abs().max())


def row_of(folder: Path) -> dict[str, str]:
    """What was compared for one model of the fixtures, as text."""
    model = opened(folder)
    inputs, expected = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "expected"))
    found: dict[str, str] = {}

    def batch(name: str) -> float | None:
        if f"{name}.logits" not in expected:
            return None
        mask, more = inputs.get(f"{name}.attention_mask"), {}
        for key in ("position_ids", "token_type_ids"):
            if f"{name}.{key}" in inputs:
                more[key] = inputs[f"{name}.{key}"]
        with torch.no_grad():
            return difference(model(inputs[f"{name}.input_ids"], mask, **more), expected[f"{name}.logits"], mask)

    for column, names in {
        "logits": ("plain", "one_token", "token_types"),
        "padded right": ("right_pad",),
        "padded left": ("left_pad", "left_pad_pos"),
    }.items():
        errors = [e for e in map(batch, names) if e is not None]
        found[column] = f"{max(errors):.1e}" if errors else "-"
    logits, labels = model(inputs["right_pad.input_ids"], inputs["right_pad.attention_mask"]), inputs["loss.labels"]
    if model.config.head == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found["loss"] = f"{difference(loss.detach(), expected['loss.value'].reshape(())):.1e}"
    loss.backward()
    norms = json.loads((folder / "meta.json").read_text())["grad_l2"]
    ours = {path: float(p.grad.norm()) for path, p in model.named_parameters()}
    found["gradient norms"] = f"{max(abs(ours[k] - v) for k, v in norms.items()) / max(norms.values()):.1e}"
    if "greedy.output_ids" in expected:
        found["greedy tokens"] = same_tokens(model, inputs, expected)
    new = folder / "config_transformers5.json"
    if new.is_file():
        read = [config_from_json(json.loads(f.read_text())) for f in (folder / "config.json", new)]
        found["both spellings"] = "equal" if read[0] == read[1] else "DIFFER"
    return found


def same_tokens(model: nn.Module, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    equal = total = 0
    for name, key in (("greedy", "greedy.input_ids"), ("greedy_left_pad", "left_pad.input_ids")):
        if f"{name}.output_ids" not in expected:
            continue
        ids, mask = inputs[key], inputs.get(key.replace("input_ids", "attention_mask"))
        prompts = [row[m.bool()].tolist() for row, m in zip(ids, torch.ones_like(ids) if mask is None else mask)]
        wanted = expected[f"{name}.output_ids"][:, ids.shape[1] :]
        got = torch.tensor(generate_ids(model, prompts, wanted.shape[1]))
        equal, total = equal + int((got == wanted).sum()), total + wanted.numel()
    return f"{equal} of {total}"


def stretched() -> list[tuple[str, float]]:
    """(rope, largest difference of the logits) within and beyond the original context."""
    expected, rows = load_file(MODELS / "stretched.safetensors"), []
    for name, (base, rope, positions) in json.loads((MODELS / "stretched.json").read_text()).items():
        raw = json.loads((MODELS / base / "config.json").read_text())
        raw |= {"rope_scaling": rope, "max_position_embeddings": positions, "original_max_position_embeddings": 32}
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "config.json").write_text(json.dumps(raw if base == "phi3" else without_original(raw)))
            (folder / "model.safetensors").write_bytes((MODELS / base / "model.safetensors").read_bytes())
            model = opened(folder)
            with torch.no_grad():
                errors = [
                    difference(model(expected["input_ids"][:1, :n])[:, -8:], expected[f"{name}.{n}"]) for n in (24, 48)
                ]
        rows.append((f"{base}, rope {name}", max(errors)))
    return rows


def without_original(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != "original_max_position_embeddings"}


def real() -> tuple[float, str]:
    """SmolLM2 from its GGUF file: the largest difference of a token's log-likelihood, and greedy tokens."""
    model, tokenizer = load("quickstart", dtype=torch.float32, device="cpu", progress=False)
    assert tokenizer is not None
    cases = json.loads((MODELS.parent / "tokenizer" / "smollm2_text.json").read_text())["cases"]
    error, equal, total = 0.0, 0, 0
    for case in cases:
        ids = torch.tensor([tokenizer.encode(case["text"], parse_special=True)])
        with torch.no_grad():
            nll = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        error = max(error, difference(nll, torch.tensor(case["token_nll"])))
        got, wanted = generate_ids(model, ids.tolist(), 16, tokenizer.eos_ids)[0], case["greedy16"]
        wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
        equal, total = equal + sum(a == b for a, b in zip(got, wanted)), total + len(wanted)
    return error, f"{equal} of {total}"


def main(say: Callable[[str], None] = print) -> None:
    say("| model | " + " | ".join(COLUMNS) + " |")
    say("| --- |" + " --- |" * len(COLUMNS))
    for folder in sorted(p.parent for p in MODELS.glob("*/meta.json")):
        found = row_of(folder)
        say(f"| {folder.name} | " + " | ".join(found.get(column, "-") for column in COLUMNS) + " |")
    expected = load_file(MODELS / "llama_biased" / "logits.safetensors")
    with torch.no_grad():
        error = difference(opened(MODELS / "llama_biased")(expected["input_ids"]), expected["logits"])
    for name, largest in [("llama with every bias", error), *stretched()]:
        say(f"| {name} | {largest:.1e} |" + " - |" * (len(COLUMNS) - 1))
    if (cache_folder() / MODEL).is_file():
        error, tokens = real()
        say(f"| SmolLM2-135M-Instruct | {error:.1e} |" + " - |" * 4 + f" {tokens} | - |")


if __name__ == "__main__":
    main()
