"""Every adapter method on the same task: python -m bench.bench_methods [--profile short|full] [--methods lora,dora,...]

The task is the bundled domain on the quickstart model (NF4, double quantization), as the quickstart recipe trains it,
for a number of steps that the profile sets; each method with its own default targets and a rate that suits it. Columns,
as PEFT's method comparison has them: what the tuned model gets right (paraphrases, traps), what it forgot (general
perplexity against the same quantized base), trainable share, forward time over the base's, file size, time and memory.
Each method runs in a process of its own, so that peak memory is its own. Rows go to bench/results/methods.jsonl, the
table to standard output, a plot beside it where matplotlib is installed.

The short profile is meant to end within 40 minutes on 2 free cores; it ranks methods roughly and proves nothing final.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# rates: about what each paper trains with, scaled to the quickstart's 2e-3 for LoRA
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 32, "alpha": 64, "lr": 2e-3},
    "lora, rslora": {"method": "lora", "rank": 32, "alpha": 16, "rank_stabilized": True, "lr": 2e-3},
    "lora+": {"method": "lora", "rank": 32, "alpha": 64, "lr_ratio": 8.0, "lr": 7e-4},
    "dora": {"rank": 32, "alpha": 64, "lr": 2e-3},
    "pissa": {"rank": 32, "alpha": 32, "lr": 1e-3},
    "adalora": {"rank": 24, "target_rank": 16, "alpha": 48, "lr": 3e-3},
    "loha": {"rank": 16, "alpha": 16, "lr": 3e-3},
    "lokr": {"rank": 16, "alpha": 16, "lr": 3e-3},
    "vera": {"rank": 256, "lr": 2e-2},
    "oft": {"block_size": 16, "lr": 2e-3},
    "ia3": {"lr": 1e-2},
    "full": {"lr": 2e-4},
    "houlsby": {"rank": 32, "lr": 2e-3},
    "pfeiffer": {"rank": 64, "lr": 2e-3},
    "parallel": {"rank": 64, "lr": 2e-3},
    "prefix": {"tokens": 16, "lr": 1e-2},
    "prompt": {"tokens": 20, "lr": 5e-2},
    "p_tuning": {"tokens": 20, "lr": 1e-3},
}
PROFILES = {
    "smoke": {"steps": 2, "subjects": 4, "questions": 4},
    "short": {"steps": 60, "subjects": 12, "questions": 60},
    "full": {"steps": None, "subjects": None, "questions": None},
}
COLUMNS = ("paraphrase", "trap", "perplexity", "trainable_share", "overhead", "file_mb", "train_s", "peak_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="short")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, PROFILES[arguments.profile])))
        return
    rows = []
    for name in arguments.methods.split(","):
        command = [sys.executable, "-m", "bench.bench_methods", "--one", name, "--profile", arguments.profile]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(line(rows[-1]), flush=True)
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "methods.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1] | {"profile": arguments.profile}) + "\n")
    print("\n" + f"{'method':<14}" + "".join(f"{c:>16}" for c in COLUMNS))
    for row in rows:
        print(line(row))
    plot(rows)


def line(row: dict[str, Any]) -> str:
    cells = (row.get(column) for column in COLUMNS)
    return f"{row['method']:<14}" + "".join(f"{'-' if c is None else format(c, '.4g'):>16}" for c in cells)


def measure(name: str, profile: dict[str, Any]) -> dict[str, Any]:
    """One run of the quickstart recipe with this method."""
    import lowrank
    from lowrank.training.loop import peak_memory_mb

    settings = dict(METHODS[name])
    rate = settings.pop("lr")
    adapter = {"method": settings.pop("method", name), **settings}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}/run", f"train.lr={rate}", "train.save_every=0"]
        overrides += [f"data.subjects={profile['subjects']}"] if profile["subjects"] else []
        overrides += [f"eval.questions={profile['questions']}"] if profile["questions"] else []
        overrides += [f"train.steps={profile['steps']}"] if profile["steps"] else []
        recipe = folder + "/recipe.yaml"
        Path(recipe).write_text(with_adapter(adapter), encoding="utf-8")
        start = time.perf_counter()
        run = lowrank.train(recipe, overrides)
        seconds = time.perf_counter() - start
        tuned, base = run.results["tuned"], run.results["base"]
        size = sum(file.stat().st_size for file in (Path(folder) / "run" / "adapter").iterdir()) / 1e6
        overhead, share = inference(Path(folder) / "run" / "adapter")
    return {
        "method": name,
        "paraphrase": tuned.get("paraphrase"),
        "trap": tuned.get("trap"),
        "perplexity": change(tuned.get("perplexity"), base.get("perplexity")),
        "trainable_share": share,
        "overhead": overhead,
        "file_mb": size,
        "train_s": seconds,
        "peak_mb": peak_memory_mb(),
    }


def with_adapter(adapter: dict[str, Any]) -> str:
    """The quickstart recipe with another adapter."""
    from omegaconf import OmegaConf

    from lowrank.training.config import recipe_path

    recipe = OmegaConf.load(recipe_path("quickstart"))
    recipe.adapter = adapter
    return OmegaConf.to_yaml(recipe)


def change(tuned: float | None, base: float | None) -> float | None:
    """Perplexity against the quantized base, in percent."""
    return None if tuned is None or not base else 100 * (tuned / base - 1)


def inference(folder: Path) -> tuple[float, float]:
    """Forward time of 4 x 64 tokens over the base's in percent, and the share of parameters that the adapter has."""
    import torch

    import lowrank
    from lowrank.active import acting
    from lowrank.filling import adapter_state
    from lowrank.targets import count_parameters

    model, _ = lowrank.load("quickstart", quantize="nf4-dq", progress=False)
    name = lowrank.load_adapter(model, folder, force=True)
    ids, times = torch.randint(1000, (4, 64)), {name: [], None: []}
    for _ in range(5):
        for choice in times:
            with torch.no_grad(), acting(model, choice):
                start = time.perf_counter()
                model(ids)
                times[choice].append(time.perf_counter() - start)
    with_it, without = (sorted(times[choice])[2] for choice in (name, None))
    own = sum(value.numel() for value in adapter_state(model, name).values())
    return 100 * (with_it / without - 1), own / (count_parameters(model) - own)


def plot(rows: list[dict[str, Any]]) -> None:
    """Trainable share against what is right, forgetting as colour."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = [row for row in rows if row["paraphrase"] is not None]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    forgotten = [row["perplexity"] or 0.0 for row in rows]
    dots = axes.scatter([row["trainable_share"] for row in rows], [row["paraphrase"] for row in rows], c=forgotten)
    for row in rows:
        axes.annotate(row["method"], (row["trainable_share"], row["paraphrase"]), fontsize=8)
    axes.set(xscale="log", xlabel="trained parameters / all", ylabel="held-out paraphrases right")
    figure.colorbar(dots, label="general perplexity against the base, %")
    figure.savefig(RESULTS / "methods.png", dpi=120)


if __name__ == "__main__":
    main()
