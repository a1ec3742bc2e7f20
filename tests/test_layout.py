"""The layout's promises: every module imports, public names stay public, nothing needs the links, no import cycles."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowrank"
LINKS = ("kernels", "models", "quant")
FORBIDDEN = {"transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
LEAVES = {"lowrank.errors", "lowrank.files"}
# who may import whom: a package may import those of a lower number, and its own
LEVEL = {"kernels": 1, "quant": 2, "core": 3, "models": 4, "training": 5, "evaluation": 5, "cli": 6}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]


def imports_of(path: Path, run: bool = False) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too; with `run`, not what only types need."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if run:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the file that defines it"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room(module: str) -> str:
    """Which room of the house a module is in: its sub-package, or core."""
    parts = module.split(".")
    if module in ("lowrank", "lowrank.cli", "lowrank.chat", "lowrank.doctor"):
        return "cli"
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() and parts[1] != "methods" else "core"


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_every_module_imports_and_the_public_names_stay_callable(tmp_path) -> None:
    code = f"""
import importlib
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
import lowrank
for name in lowrank.__all__:
    assert callable(getattr(lowrank, name)), f"lowrank.{{name}} is {{getattr(lowrank, name)!r}}"
assert not hasattr(lowrank, "no_such_name")
print("ok")
"""
    for cwd in (ROOT, tmp_path):
        done = run_python(code, cwd)
        assert done.stdout.strip().endswith("ok"), done.stderr


def test_importing_lowrank_does_not_load_torch(tmp_path) -> None:
    done = run_python("import sys, lowrank; print('torch' in sys.modules)", tmp_path)
    assert done.stdout.strip() == "False", done.stderr


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import lowrank

    taken = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not taken & set(lowrank.__all__)


def test_sub_packages_have_no_init() -> None:
    assert [p.parent.name for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE] == ["methods"]


def test_the_links_are_relative_and_nothing_needs_them() -> None:
    for name in LINKS:
        link = ROOT / name
        if link.is_symlink():
            assert os.readlink(link) == f"lowrank/{name}"
        else:  # a checkout without links (Windows, a zip file) has a small file there, or nothing; never a real folder
            assert not link.is_dir(), f"{name}/ must be a link to lowrank/{name}: a package of that name shadows others"
    bare = {"kernels", "models", "quant", "methods", "training", "evaluation", "data"}
    for path in [*MODULES.values(), *SCRIPTS]:
        wrong = {name for name in imports_of(path) if name.split(".")[0] in bare}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: write lowrank.{min(wrong)}"


def test_the_peers_are_never_imported() -> None:
    for name, path in MODULES.items():
        assert not {i.split(".")[0] for i in imports_of(path)} & FORBIDDEN, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_dependencies_run_one_way(name: str) -> None:
    mine = room(name)
    for target in imports_of(MODULES[name]):
        if target not in MODULES or target in LEAVES or target == "lowrank":
            continue
        theirs = room(target)
        if name in LEAVES:
            assert target in LEAVES, f"{name} is a leaf and imports {target}"
        elif mine == "data":
            assert theirs == "data", f"{name} imports {target}: data imports the leaves only"
        elif theirs == "data":
            assert mine in ("training", "evaluation", "cli"), f"{name} imports {target}"
        elif name != "lowrank":  # its names are loaded lazily
            assert LEVEL[theirs] <= LEVEL[mine], f"{name} ({mine}) imports {target} ({theirs})"


def test_imports_have_no_cycle() -> None:
    graph = {
        name: {target for target in imports_of(path, run=True) if target in MODULES and target not in (name, "lowrank")}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        if name != "lowrank":
            visit(name, ())


# function -> its first parameters; other people's scripts call them by position and by name
SIGNATURES = {
    "lowrank.load": "source quantize dtype device",
    "lowrank.attach": "model config targets exclude train_also name",
    "lowrank.detach": "model name",
    "lowrank.activate": "model choice layers",
    "lowrank.rows": "model choices",
    "lowrank.merge": "model name to force",
    "lowrank.unmerge": "model",
    "lowrank.save_adapter": "model folder name format",
    "lowrank.load_adapter": "model folder name trainable",
    "lowrank.combine": "model weights method name options",
    "lowrank.train": "config",
    "lowrank.evaluate": "config_or_run",
    "lowrank.generate": "model tokenizer prompt_or_messages max_new_tokens temperature",
    "lowrank.training.loop.fit": "model batches config",
    "lowrank.models.tokenizer.load_tokenizer": "path",
    "lowrank.adapter.register": "name",
    "lowrank.adapter.dense_weight": "layer",
    "lowrank.quant.nf4.quantize": "w block_size",
    "lowrank.quant.nf4.dequantize": "packed absmax shape dtype block_size",
    "lowrank.quant.tensor.QuantizedTensor.quantize": "w format block_size double_quant",
    "lowrank.quant.tensor.QuantizedTensor.dequantize": "self dtype",
    "lowrank.quant.tensor.QuantizedTensor.state_dict": "self prefix",
    "lowrank.quant.tensor.QuantizedTensor.from_state_dict": "state prefix",
    "lowrank.quant.bounds.elementwise": "q dtype",
    "lowrank.quant.bounds.matmul": "q x",
    "lowrank.quant.linear.QuantizedLinear": "q bias",
    "lowrank.quant.linear.quantize_model": "model format block_size exclude",
    "lowrank.quant.linear.linear": "x q bias",
    "lowrank.kernels.nf4_linear.nf4_linear": "x packed absmax out_features block_size bias",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_parameters_keep_their_names_and_order(name: str) -> None:
    parts = name.split(".")
    split = next(i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in MODULES)
    found: object = importlib.import_module(".".join(parts[:split]))
    for part in parts[split:]:
        found = getattr(found, part)
    wanted = SIGNATURES[name].split()
    assert callable(found) and list(inspect.signature(found).parameters)[: len(wanted)] == wanted
