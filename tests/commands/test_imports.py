"""Structure of the package: layers of imports, modules without torch, sizes of files."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import build_dataset

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gvpo_offline"
# From the lowest layer up. A module imports from its own and lower layers, without cycles.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("version", "visible", "errors", "hashing", "identity", "progress_bar"),
        *("files", "exit_status", "limits", "bounded_yaml", "secret_settings"),
        *("system_errors", "interrupts"),
    ),
    ("json_text",),
    ("group", "settings", "messages", "ranges"),
    ("cells", "paths"),
    ("rules", "values", "conversations", "finish_reasons"),
    ("store",),
    ("findings", "contract"),
    ("info",),
    ("hub", "buckets"),
    ("workers", "openai", "collectives"),
    ("stream",),
    ("compute",),
    ("plan",),
    ("tokenizer", "chat", "token_texts"),
    ("importing",),
    ("merging",),
    ("sampling", "rewards", "reference"),
    ("losses",),
    ("sampled_eval",),
    ("train",),
    ("tune",),
    ("report", "doctor"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# Subpackages that make and score data; they may not import training code.
DATA_ROOMS = ("importing", "merging", "sampling", "rewards", "reference", "openai", "workers")
# Modules that must not import torch, because they run without it or must start fast.
WITHOUT_TORCH = (
    *("version", "visible", "errors", "hashing", "group", "rules", "values", "contract"),
    *("cells", "paths", "finish_reasons", "json_text", "messages", "conversations"),
    *("identity", "settings", "compute.settings", "reference.settings", "tune.settings"),
    *("sampled_eval.settings", "rewards.fresh"),
    *("store.adopt", "store.dataset", "store.survey", "store.validate", "store.writer"),
    *("store.arrow", "store.schema", "train.settings"),
    *("store.remote.storage", "stream.settings", "stream.mix", "stream.order", "stream.plan"),
    *("stream.selecting.select", "stream.selecting.where", "stream.view", "stream.recorded"),
    *("commands.order", "commands.order_record"),
    *("train.checkpoint", "tokenizer", "tune.search", "tune.judged", "commands.table", "cli"),
    *("train.run_folder", "train.limits", "train.checkpoint_files", "tune.trial_files"),
    *("train.stopping", "train.run_lock", "secret_settings"),
    *("findings.light", "findings.full", "findings.gate", "findings.formats.junit"),
    *("info.dataset", "info.text", "hub.push", "hub.pull"),
    *("compute.layout", "compute.tree", "compute.context", "compute.files"),
    *("importing.importer", "merging.stages", "sampling.run"),
    *("workers.settings", "workers.run", "rewards.stage"),
    *("train.data_rules", "report.settings", "report.report", "report.dataset.build"),
    *("doctor.diagnose", "commands.doctor", "buckets", "buckets.copy", "doctor.bucket"),
    *("plan.config_file", "plan.forecast", "plan.settings", "commands.plan"),
    *("report.page.html", "report.page.live", "report.page.fragment"),
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    """`store.commit` for gvpo_offline/store/commit.py, and `store` for its `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    assert len(found) == 1, f"{module} belongs to {len(found)} layers: give it one in LAYERS"
    return found[0]


def imported(path: Path, *, at_the_top: bool = False) -> Iterator[str]:
    """The modules of the package that a file imports, except under TYPE_CHECKING.

    Args:
        path: the file.
        at_the_top: leave out imports inside functions.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if at_the_top and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("gvpo_offline"))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gvpo_offline"):
            module = (node.module or "").removeprefix("gvpo_offline").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else module
        pending += ast.iter_child_nodes(node)


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    used = {layer_of(module) for module in MODULES if module}
    assert used == set(range(len(LAYERS)))
    tops = {module.split(".")[0] for module in MODULES}
    assert {name for names in LAYERS for name in names} <= tops


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_down(module: str) -> None:
    for other in imported(MODULES[module]):
        assert layer_of(other) <= layer_of(module), f"{module} imports {other} from above"


@pytest.mark.parametrize("room", DATA_ROOMS)
def test_making_data_never_imports_training(room: str) -> None:
    """Neither directly nor indirectly, nor inside functions."""
    pending = [module for module in MODULES if module.split(".")[0] == room]
    seen = set(pending)
    while pending:
        for other in set(imported(MODULES[pending.pop()])) - seen:
            seen.add(other)
            pending.append(other)
    assert not {module for module in seen if module.split(".")[0] in ("train", "tune", "losses")}


def test_there_are_no_import_cycles() -> None:
    """Imports inside functions count too."""
    graph = {module: set(imported(path)) - {module} for module, path in MODULES.items() if module}
    graphlib.TopologicalSorter(graph).prepare()


def test_modules_without_torch_do_not_import_it(tmp_path: Path) -> None:
    """Also the package itself, reading a dataset, and the order of a run's groups."""
    build_dataset(tmp_path, 8)
    script = f"""
import importlib, sys
import gvpo_offline
assert not {{"numpy", "pyarrow", "torch"}} & set(sys.modules), "by import gvpo_offline"
for module in {WITHOUT_TORCH!r}:
    importlib.import_module("gvpo_offline." + module)
    heavy = {{"torch", "transformers", "datasets", "peft", "polars"}} & set(sys.modules)
    assert not heavy, (module, heavy)
dataset = gvpo_offline.open_dataset({str(tmp_path)!r})
order = gvpo_offline.stream.order.GroupOrder(dataset.row_group_sizes, seed=1, window=2)
dataset.verify()
assert len(dataset.groups(int(order.take(3, 4)[0][0]))) == 4
assert not {{"torch", "pandas"}} & set(sys.modules), "by open_dataset"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    import gvpo_offline

    for name in gvpo_offline.__all__:
        assert getattr(gvpo_offline, name) is not None
    assert set(gvpo_offline.__all__) <= set(dir(gvpo_offline))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        gvpo_offline.nothing  # noqa: B018


SOURCES = [
    path
    for folder in ("gvpo_offline", "pipelines", "research", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
