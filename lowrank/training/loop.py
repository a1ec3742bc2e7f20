"""The training loop: one function that is one story.

Each optimizer step takes one batch, splits it into micro-batches, and divides the summed loss by the target tokens of
the WHOLE batch, so that the gradient does not depend on the split. A state dictionary (adapter, moments, data position,
random state, best loss so far) resumes exactly: a killed run ends with the same bytes as one that was left alone.
"""

import ctypes
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, training_adapters
from lowrank.data.batches import Batch, split
from lowrank.errors import at_least
from lowrank.files import read_tensors, write_tensors, write_text
from lowrank.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint, trained
from lowrank.training.losses import mean_loss, summed_loss, targets_in
from lowrank.training.optim import OptimConfig, make_optimizer, rate, set_rate

BEST = "checkpoints/best.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimConfig):
    steps: int | None = None
    """Optimizer steps; None takes `epochs` passes over the data."""

    epochs: int = 1
    """Passes over the data, where `steps` is not given."""

    batch_size: int = 16
    """Examples an optimizer step, over all devices."""

    micro_batch_size: int | None = None
    """Examples a forward pass; None takes the whole batch at once. It changes memory, never the gradient."""

    seed: int = 0
    """Fixes the adapter's initial values, the data order and dropout of a whole run; `fit` alone takes the random state
    as it finds it."""

    eval_every: int = 0
    """Steps between validations; 0 leaves them out."""

    patience: int = 0
    """Stop after this many validations without a better loss; 0 never stops early."""

    keep_best: bool = False
    """End with the weights of the best validation instead of the last step's."""

    save_every: int = 100
    """Steps between checkpoints; 0 saves only when interrupted."""

    keep: int = 1
    """Checkpoints kept."""

    checkpointing: bool = False
    """Recompute each layer's activations in backward: less memory, about a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size", "epochs", "keep", "steps", "micro_batch_size")
        at_least(self, 0, "eval_every", "patience", "save_every")
        if (self.patience or self.keep_best) and not self.eval_every:
            raise ValueError("patience and keep_best need eval_every: they look at the validation loss")


@dataclass
class Run:
    """What training leaves. `metrics` holds the last values; `log` one row a step; the files lie in `folder`."""

    folder: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False


class Cycle:
    """A list of batches, over and over, with a position that resumes."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = list(batches)
        self.position = 0
        if not self.batches:
            raise ValueError("there is nothing to train on: no batches")

    @property
    def batches_per_epoch(self) -> int:
        return len(self.batches)

    def next(self) -> Batch:
        batch = self.batches[self.position % len(self.batches)]
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def fit(
    model: nn.Module,
    batches: Any,
    config: TrainConfig,
    *,
    validation: list[Batch] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Train what has requires_grad in `model`, in place.

    `batches`: dictionaries with input_ids, attention_mask and labels (unshifted, -100 where no loss is taken), one for
    each optimizer step; a list is cycled, a `data.batches.Loader` keeps its own order. `on_step` gets each step's row.
    With a `folder`, checkpoints and metrics.jsonl are written there and Ctrl-C saves a state that `resume=True` goes on
    from. Raises RuntimeError when the loss is not finite.
    """
    source = batches if hasattr(batches, "state_dict") else Cycle(batches)
    steps = config.steps or config.epochs * source.batches_per_epoch
    folder = None if folder is None else Path(folder)
    if (config.keep_best or config.patience) and not validation:
        raise ValueError("keep_best and patience look at the validation loss: give validation data (data.validation)")
    if folder is not None and not resume and checkpoints(folder):
        raise ValueError(f"{folder} holds checkpoints of another run: choose another folder, or go on with resume=True")
    optimizer = make_optimizer(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if hasattr(model, "checkpointing"):
        model.checkpointing = config.checkpointing  # type: ignore[assignment]
    elif config.checkpointing:
        raise ValueError(f"checkpointing is offered by lowrank's own models; {type(model).__name__} has no such switch")
    run = Run(folder)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "best": None, "stale": 0}
    best_weights: dict[str, Tensor] = {}
    if resume and folder is not None and (found := checkpoints(folder)):
        state = load_checkpoint(found[-1], model, optimizer)
        source.load_state_dict(state["data"])
        if state["best"] is not None and config.keep_best:
            best_weights = read_tensors(folder / BEST)
    log = _Log(folder, keep_until=state["step"])
    device = next(model.parameters()).device
    started, first, tokens_before = time.perf_counter(), state["step"], state["tokens"]

    def save() -> None:
        if folder is not None:
            save_checkpoint(folder, model, optimizer, state | {"data": source.state_dict()}, config.keep)

    if first == 0:
        _prepare(model, source)
    model.train()
    with _interruptible() as interrupted:
        for step in range(first, steps):
            batch = {key: value.to(device) for key, value in source.next().items()}
            factor = rate(step, steps, config)
            set_rate(optimizer, factor)
            loss = _accumulate(model, batch, config.micro_batch_size)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or float("inf"))
            if not (torch.isfinite(norm) and loss == loss and abs(loss) != float("inf")):
                raise RuntimeError(
                    f"step {step}: loss {loss}, gradient norm {float(norm)}: not finite; lower train.lr"
                    f" (now {config.lr}) or look at the data; the adapter of the last checkpoint is untouched"
                )
            optimizer.step()
            for adapter in training_adapters(model):
                adapter.after_step(step, steps)  # the gradients are still there: rank budgets look at them
            optimizer.zero_grad()
            state["step"] = step + 1
            state["tokens"] += int(batch["attention_mask"].sum())
            seconds = time.perf_counter() - started
            row = {
                "step": step,
                "loss": loss,
                "lr": config.lr * factor,
                "grad_norm": float(norm),
                "tokens": state["tokens"],
            }
            log.write(row)
            run.log.append(row)
            view = row | {
                "steps": steps,
                "tokens_per_s": (state["tokens"] - tokens_before) / seconds,
                "peak_memory_mb": peak_memory_mb(),
                "left_s": seconds / (step + 1 - first) * (steps - step - 1),
            }
            if validation and config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
                view["eval_loss"] = _validate(model, validation, state, log, step)
                if state["stale"] == 0 and config.keep_best:
                    best_weights = {name: p.detach().clone() for name, p in trained(model).items()}
                    if folder is not None:
                        write_tensors(folder / BEST, best_weights)
            if on_step is not None:
                on_step(view)
            if config.patience and state["stale"] >= config.patience:
                break
            if step % 2 == 1:
                give_back_memory()
            if interrupted():
                run.interrupted = True
                save()
                break
            if config.save_every and ((step + 1) % config.save_every == 0 or step + 1 == steps):
                save()
    if best_weights and not run.interrupted:
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(best_weights[name])
    model.eval()
    run.metrics = {
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": time.perf_counter() - started,
        "loss": run.log[-1]["loss"] if run.log else None,
        "best_eval_loss": state["best"],
    }
    return run


def _prepare(model: nn.Module, source: Any) -> None:
    """The adapters' initial values from data. They look at the first batches; training then starts at the first."""
    position = source.state_dict()
    for adapter in training_adapters(model):
        if type(adapter).prepare is not Adapter.prepare:
            adapter.prepare(model, iter(source.next, None))
            source.load_state_dict(position)


def _accumulate(model: nn.Module, batch: Batch, micro_batch_size: int | None) -> float:
    """Gradients of the mean loss over the batch's target tokens, plus each adapter's penalty; returns that loss."""
    targets = targets_in(batch)
    if targets == 0:
        raise ValueError("all labels of this batch are masked: there is nothing to learn from it")
    total = 0.0
    for part in split(batch, micro_batch_size):
        if targets_in(part) == 0:
            continue
        loss = summed_loss(model, part) / targets
        loss.backward()
        total += float(loss.detach())
    penalties = [
        penalty
        for adapter in training_adapters(model)
        if (penalty := adapter.penalty()) is not None and penalty.requires_grad
    ]
    if penalties:
        penalty = torch.stack(penalties).sum()
        penalty.backward()
        total += float(penalty.detach())
    return total


def _validate(model: nn.Module, batches: list[Batch], state: dict[str, Any], log: "_Log", step: int) -> float:
    device = next(model.parameters()).device
    loss = mean_loss(model, [{key: value.to(device) for key, value in batch.items()} for batch in batches])
    better = state["best"] is None or loss < state["best"]
    state["best"], state["stale"] = (loss, 0) if better else (state["best"], state["stale"] + 1)
    log.write({"step": step, "eval_loss": loss})
    return loss


class _Log:
    """metrics.jsonl. Rows of steps that a resumed run does again are dropped first."""

    def __init__(self, folder: Path | None, keep_until: int) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        if self.path is None:
            return
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = []
        for line in rows:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run may be half written
                break
            if row["step"] < keep_until:
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C (or a polite kill) is remembered instead of raised; a second one raises."""
    seen: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library is glibc: batches of ever other sizes fragment its heap.

    Pages that come back cost their first touch again, so this is for every few steps, not for every one.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory_mb() -> float:
    """The most memory this process has held: on the GPU where it has one, else resident (ru_maxrss), in MB (10^6)."""
    if torch.cuda.is_available() and (most := torch.cuda.max_memory_allocated()):
        return most / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
