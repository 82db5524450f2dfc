"""Imports run one way: a room may import the rooms below it, never one above or beside it."""

import ast
import pathlib

import pytest

import distill_jax

ROOT = pathlib.Path(distill_jax.__file__).parent
BASE = {"artifacts", "progress"}
LOW = BASE | {"losses", "models", "parallel", "data"}
MIDDLE = LOW | {"teachers", "pruning", "training"}
HIGH = MIDDLE | {"posttraining", "evaluation"}
MAY_IMPORT = {
    "artifacts": set(),
    "progress": set(),
    "losses": set(),
    "testing": BASE | {"losses"},
    **dict.fromkeys(("models", "parallel", "data"), BASE),
    **dict.fromkeys(("teachers", "pruning", "training"), LOW),
    **dict.fromkeys(("posttraining", "evaluation"), MIDDLE),
    "overrides": BASE,
    "recipe": HIGH | {"overrides"},
    "pipeline": BASE | {"parallel"},
    "stages": HIGH | {"recipe", "pipeline"},
    "planning": HIGH | {"recipe", "stages"},
    "commands": HIGH | {"recipe", "pipeline", "stages", "planning"},
    "cli": HIGH | {"commands", "stages", "planning"},
}


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: pathlib.Path) -> set[str]:
    """Names below distill_jax that a file imports, such as "models.llama"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {n.removeprefix("distill_jax.") for n in names if n.startswith("distill_jax.")}
    return {name for name in below if not name.startswith("__")}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_back(path):
    own = room(path)
    used = {name.split(".")[0] for name in imported_modules(path)} - {own}
    assert used <= MAY_IMPORT[own], f"{path} imports {used - MAY_IMPORT[own]}"


def test_no_stage_imports_another():
    shared = {"context", "records"}
    for path in (ROOT / "stages").glob("*.py"):
        if path.stem in {"__init__", *shared}:
            continue
        below = {n.split(".")[1] for n in imported_modules(path) if n.startswith("stages.")}
        assert below <= shared, f"{path} imports {below - shared}"


def test_modules_of_a_room_form_no_cycle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
        if path.name != "__init__.py"
    }

    def targets(path):
        found = imported_modules(path)
        return {m for m in modules if any(n == m or n.startswith(m + ".") for n in found)}

    graph = {name: targets(path) - {name} for name, path in modules.items()}
    while graph:
        free = [name for name, below in graph.items() if not below & graph.keys()]
        assert free, f"cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_its_room(path):
    assert len(path.read_text().splitlines()) <= 400
