"""`lowrank quant report`: a model's own weights and a text through every format."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapter import is_linear
from lowrank.errors import ConfigError
from lowrank.evaluation.perplexity import perplexity
from lowrank.models.decoder import Conv1D
from lowrank.models.load import load
from lowrank.quant.report import QuantReport, measure
from lowrank.quant.tensor import QuantizedTensor
from lowrank.targets import HEADS
from lowrank.training.screen import counting


def linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight (O, I)) of the layers that quantization would round: the linear ones without the head."""
    for path, layer in model.named_modules():
        if is_linear(layer) and path.rsplit(".", 1)[-1] not in HEADS:
            weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
            yield f"{path}.weight", weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def report_of(source: str, formats: Sequence[str], block_size: int = 64, text: str | Path | None = None) -> QuantReport:
    """Measured errors, bounds and bits of each weight in each format; with `text` (a file) perplexities as well."""
    words = Path(text).read_text(encoding="utf-8") if text is not None else None
    model, tokenizer = load(source, dtype=torch.float32)
    if words is not None and tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer, so no perplexity can be taken; leave --text out")
    ids = tokenizer.encode(words, add_special=True) if tokenizer is not None and words is not None else []
    weights = list(linear_weights(model))
    done = 0

    def of_format(format: str | None) -> float:
        held, _ = load(source, dtype=torch.bfloat16, progress=False)
        if format is not None:
            for name, weight in weights:  # from fp32, as `load` does
                rounded = QuantizedTensor.quantize(weight, format, block_size).dequantize(torch.bfloat16)
                turned = isinstance(held.get_submodule(name.removesuffix(".weight")), Conv1D)
                held.get_parameter(name).data.copy_(rounded.T if turned else rounded)
        return perplexity(held, ids).value

    with counting("weights", len(weights)) as count:

        def progress(name: str) -> None:
            nonlocal done
            done += 1
            count(done)

        return measure(weights, formats, block_size, of_format if words is not None else None, progress)
