"""The house stands as drawn: imports never run upwards, there are no circles, and one module knows orbax."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxops"

FLOORS = [
    {"core", "config"},
    {"tables", "data"},
    {"models", "objectives"},
    {"rl", "evaluate", "report"},
    {"run"},
    {"families"},
    {"sweep", "plan", "launch", "audit", "testing", "registry", "serve", "experiment", "monitor", "label"},
    {"flow"},
    {"cli", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FAMILIES = {
    "sasrec",
    "hstu",
    "two_tower",
    "twotower",
    "dlrm",
    "dcnv2",
    "bert4rec",
    "gru4rec",
    "llama",
    "qwen",
    "gpt2",
}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file, of every module in the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(name: str) -> ast.Module:
    path = modules()[name]
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def resolve(name: str) -> str:
    """The module that a dotted name lives in: `jaxops.core.sums.Sum` -> `jaxops.core.sums`."""
    while name not in modules() and "." in name:
        name = name.rpartition(".")[0]
    return name


def imported(name: str, nodes: ast.AST) -> set[str]:
    """Every module that `name` imports below `nodes`, in functions too; jaxops' own as modules."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {resolve(f) if f.split(".")[0] == "jaxops" else f for f in found}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some circle of the graph, first and last the same; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(edges.get(node, ())):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := walk(node, []))), [])


def own_imports(name: str) -> set[str]:
    return {m for m in imported(name, tree(name)) if m.split(".")[0] == "jaxops" and m != name}


def test_every_room_has_a_floor():
    unknown = {room(name) for name in modules() if room(name)} - set(LEVEL)
    assert not unknown, f"no floor for {sorted(unknown)}: add it to FLOORS here and to the map in the README"


def test_imports_never_run_upwards():
    upwards = [
        f"{name} imports {target}"
        for name in modules()
        for target in own_imports(name)
        if room(name) and room(target) and LEVEL[room(target)] > LEVEL[room(name)]
    ]
    assert not upwards, "\n".join(upwards)


def test_the_floor_of_data_knows_no_sort_of_data():
    """`data/` is neutral; a folder beside it holds what one sort of data needs, and knows no other."""
    allowed = {"jaxops.data.criteo"}  # stands in for a module that moved
    made_of = {"preferences": "text", "prompts": "text"}  # judgements are of texts, and so are prompts
    sorts = {name.split(".")[2] for name in modules() if room(name) == "data" and name.count(".") > 2}
    sort = lambda name: next((part for part in name.split(".")[2:3] if part in sorts), "")
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in own_imports(name)
        if room(name) == room(target) == "data"
        and sort(target) not in ("", sort(name), made_of.get(sort(name)))
        and name not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_is_not_imported_from_within():
    """`jaxops/__init__.py` reaches up to every room, so a room that imports it imports upwards unseen."""
    allowed = {"jaxops.__main__"}
    wrong = [name for name in modules() if room(name) and name not in allowed and "jaxops" in own_imports(name)]
    assert not wrong, f"import from the module that defines the name instead: {wrong}"


def test_rooms_have_no_circles():
    edges: dict[str, set[str]] = {}
    for name in modules():
        if room(name):
            edges.setdefault(room(name), set()).update({room(t) for t in own_imports(name)} - {"", room(name)})
    assert not circle(edges)


def test_modules_have_no_circles():
    edges = {name: own_imports(name) for name in modules() if room(name)}
    assert not circle(edges)


def test_circles_and_relative_imports_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    relative = ast.parse("from . import sums\nfrom .failures import UserError\nfrom ..config import errors")
    assert imported("jaxops.core.sums", relative) == {
        "jaxops.core.sums",
        "jaxops.core.failures",
        "jaxops.config.errors" if "jaxops.config.errors" in modules() else "jaxops.config",
    }


def test_one_module_imports_orbax():
    users = {name for name in modules() if any(m.split(".")[0] == "orbax" for m in imported(name, tree(name)))}
    assert users == {"jaxops.core.orbax_io"}


@pytest.mark.parametrize("word", sorted(FAMILIES))
def test_core_run_report_and_cli_name_no_model_family(word):
    neutral = ("core", "run", "report", "cli")
    named = [name for name, path in modules().items() if room(name) in neutral and word in path.read_text().lower()]
    assert not named, f"{named} mention {word!r}: they know objectives, states and tasks, not families"


def test_families_know_nothing_of_each_other():
    family = lambda name: name.split(".")[2] if name.count(".") > 1 else ""
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in own_imports(name)
        if room(name) == room(target) == "families" and family(name) != family(target)
    ]
    assert not wrong, "\n".join(wrong)


def test_package_files_are_a_docstring_only():
    full = [
        str(path.relative_to(PACKAGE.parent))
        for name, path in modules().items()
        if path.name == "__init__.py" and name != "jaxops"
        if [n for n in tree(name).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    ]
    assert not full, f"move this code into modules, so that importing a room stays free: {full}"


def test_every_module_says_its_idea_first():
    bare = [
        name for name, path in modules().items() if path.name != "__init__.py" and not ast.get_docstring(tree(name))
    ]
    assert not bare, f"no module docstring: {bare}"


def loaded_after(imports: list[str], *watched: str) -> set[str]:
    """Which of `watched` a fresh interpreter has loaded after `imports`."""
    code = "import sys\n" + "\n".join(f"import {name}" for name in imports)
    code += f"\nprint(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_jaxops_is_free():
    assert not loaded_after(["jaxops"], "jax", "numpy", "flax", "orbax", "pydantic", "pyarrow")


def test_configuration_needs_no_jax():
    """A config is read and refused before anything heavy is loaded."""
    config = [name for name in modules() if room(name) == "config"]
    assert not loaded_after(config, "jax", "flax", "orbax")
