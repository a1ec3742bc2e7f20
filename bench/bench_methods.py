"""Every adapter method on the same task: python -m bench.bench_methods [--profile short|full] [--methods lora,dora,...]

The task is the bundled domain on the quickstart model, its base dense in bf16 (so that PiSSA and LoftQ can start from
it). The profile sets subjects, steps and questions; each method has its own default targets, and a rate that suits it.
Columns, as PEFT's method comparison has them: held-out answers that are right, what was forgotten (perplexity of
general prose against the base's), trained parameters, forward time of 4 x 64 tokens over the base's, size of the file,
and of the whole process, which loads, trains and asks, CPU time and peak memory. Each method has a process of its own.

A finished method leaves a row in bench/results/methods.jsonl and is not run again (--again does); --table only shows
them, as Markdown, and draws bench/results/methods.png. The short profile takes about 40 minutes of one core; one seed
and some 60 questions rank methods roughly (a share of 60 answers is known to +-6 points) and prove nothing final.
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
WORST = 60  # % of perplexity: what forgot more stands at the plot's edge, with its figure
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 32, "alpha": 64, "lr": 2e-3},
    "rslora": {"method": "lora", "rank": 32, "alpha": 16, "rank_stabilized": True, "lr": 2e-3},
    "lora+": {"method": "lora", "rank": 32, "alpha": 64, "lr_ratio": 8.0, "lr": 7e-4},
    "dora": {"rank": 32, "alpha": 64, "lr": 2e-3},
    "loftq": {"rank": 32, "alpha": 32, "lr": 1e-3},
    "olora": {"rank": 32, "alpha": 32, "lr": 1e-3},
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
    "smoke": {"steps": 2, "subjects": 4, "questions": 4, "prose": 1000},
    "short": {"steps": 60, "subjects": 6, "questions": 168, "prose": 4000},
    "full": {"steps": None, "subjects": 40, "questions": 140, "prose": None},
}
BATCH = {"smoke": 4, "short": 4, "full": 16}
COLUMNS = {
    "paraphrase": ("facts, other words", "{:.0%}"),
    "trap": ("traps", "{:.0%}"),
    "true_premise": ("true premises", "{:.0%}"),
    "abstention": ("abstains", "{:.0%}"),
    "forgetting": ("perplexity", "{:+.1%}"),
    "trainable_share": ("trained", "{:.3%}"),
    "overhead": ("forward", "{:+.0%}"),
    "file_mb": ("file, MB", "{:.2f}"),
    "cpu_s": ("CPU, s", "{:.0f}"),
    "peak_mb": ("peak, MB", "{:.0f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="short")
    parser.add_argument("--methods", default="base," + ",".join(METHODS), help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="run a finished method once more")
    parser.add_argument("--table", action="store_true", help="run nothing: show and draw what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.profile)))
        return
    for name in arguments.methods.split(",") if not arguments.table else []:
        if name in finished(arguments.profile) and not arguments.again:
            continue
        command = [sys.executable, "-m", "bench.bench_methods", "--one", name, "--profile", arguments.profile]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps(row), flush=True)
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "methods.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    rows = [finished(arguments.profile)[name] for name in ("base", *METHODS) if name in finished(arguments.profile)]
    print(table(rows))
    spent = [row["cpu_s"] for row in rows if "cpu_s" in row]
    print(f"In all {sum(spent) / 60:.0f} CPU minutes for {len(spent)} rows.")
    plot(rows)


def finished(profile: str) -> dict[str, dict[str, Any]]:
    """The last row of each method that ran with this profile and today's settings."""
    path = RESULTS / "methods.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return {row["method"]: row for row in rows if row.get("settings") == settings_of(row["method"], profile)}


def settings_of(name: str, profile: str) -> dict[str, Any]:
    return {"profile": profile, "batch": BATCH[profile], **PROFILES[profile], **METHODS.get(name, {})}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown; forgetting is against the base's row."""
    base = next((row["perplexity"] for row in rows if row["method"] == "base"), None)
    lines = ["| method | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("| --- |" + " ---: |" * len(COLUMNS))
    for row in rows:
        row["forgetting"] = row["perplexity"] / base - 1 if base and row["method"] != "base" else None
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(name: str, profile: str) -> dict[str, Any]:
    """Train with this method (the base: with none), then ask it and time it."""
    import torch

    import lowrank
    from lowrank.evaluation.config import EvalConfig
    from lowrank.evaluation.run import measure as ask
    from lowrank.evaluation.truth import subset
    from lowrank.training.config import read_config, recipe_path
    from lowrank.training.loop import peak_memory_mb
    from lowrank.training.material import read_material

    chosen, row = PROFILES[profile], {"method": name, "settings": settings_of(name, profile)}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}/run", "quantize=null", f"data.subjects={chosen['subjects']}"]
        overrides += [f"train.batch_size={BATCH[profile]}", "train.save_every=0", "train.eval_every=0", "eval.tasks=[]"]
        overrides += [f"train.steps={chosen['steps']}"] if chosen["steps"] else []
        if name != "base":
            own = dict(METHODS[name])
            overrides += [f"train.lr={own.pop('lr')}", f"adapter={json.dumps({'method': name} | own)}"]
        config = read_config(recipe_path("quickstart"), overrides)
        if name != "base":
            run = lowrank.train(config)
            row |= {"tokens": run.metrics["tokens"], "loss": run.metrics["loss"]}
            adapter = Path(folder) / "run" / "adapter"
            row["file_mb"] = (adapter / "adapter.safetensors").stat().st_size / 1e6
        model, tokenizer = lowrank.load(config.model, template=config.data.template, progress=False)
        if name != "base":
            lowrank.load_adapter(model, adapter, name="default")
            sizes = {n: p.numel() for n, p in model.named_parameters() if ".edited." not in n}
            row["trainable_share"] = sum(size for n, size in sizes.items() if ".adapters." in n) / sum(sizes.values())
            row["overhead"] = overhead(model)
        material = read_material(config.data, config.train.seed)
        prose = material.prose[: chosen["prose"]]
        found, _ = ask(
            model, tokenizer, subset(material.test, chosen["questions"]), material.knowledge, prose, EvalConfig()
        )
    for key in ("paraphrase", "trap", "true_premise", "abstention", "perplexity"):
        row[key] = found.get(key)
    used = {"peak_mb": peak_memory_mb(), "threads": torch.get_num_threads(), "cpu_s": time.process_time()}
    return row | {"n": found["n"]} | used


def overhead(model: Any) -> float:
    """Forward time of 4 x 64 tokens over the base's, as a share: the median of alternating runs."""
    import torch

    from lowrank.active import acting

    ids, times = torch.randint(1000, (4, 64)), {"default": [], None: []}
    for _ in range(8):
        for choice in times:
            with torch.no_grad(), acting(model, choice):
                start = time.perf_counter()
                model(ids)
                times[choice].append(time.perf_counter() - start)
    with_it, without = (sorted(times[choice][1:])[3] for choice in ("default", None))
    return with_it / without - 1


def plot(rows: list[dict[str, Any]]) -> None:
    """What was forgotten against what is right; colour is the trained share."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm
    except ImportError:
        return
    rows = [row for row in rows if row.get("forgetting") is not None]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(9, 5.5))
    x = [min(100 * row["forgetting"], WORST) for row in rows]
    y, share = [100 * row["paraphrase"] for row in rows], [100 * row["trainable_share"] for row in rows]
    dots = axes.scatter(x, y, c=share, norm=LogNorm(), s=60, cmap="viridis_r", edgecolor="black", linewidth=0.5)
    labels: dict[tuple[float, float], str] = {}
    for row, a, b in zip(rows, x, y):
        name = row["method"] + (f" ({row['forgetting']:+.0%})" if a == WORST else "")
        near = next((at for at in labels if abs(at[0] - a) < 1.5 and abs(at[1] - b) < 2), (a, b))
        labels[near] = f"{labels[near]}; {name}" if near in labels else name
    for at, text in labels.items():
        height = 4 + 10 * sum(abs(b - at[1]) < 2 and 0 < at[0] - a < 8 for a, b in labels)  # over a label to the left
        side = {"xytext": (-6, height), "ha": "right"} if at[0] == WORST else {"xytext": (6, height)}
        axes.annotate(text, at, textcoords="offset points", fontsize=8, **side)
    axes.set(xlabel="perplexity of general prose against the base, %", ylabel="facts right in other words, %")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    figure.colorbar(dots, label="trained parameters, % of all")
    figure.tight_layout()
    figure.savefig(RESULTS / "methods.png", dpi=120)


if __name__ == "__main__":
    main()
