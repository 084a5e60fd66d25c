"""Imports run downwards only, torch stays off the plain path, no attack takes a key.

The layers and what may never be imported stand in `pyproject.toml`, for import-linter. Libraries
that are slow to load are imported inside functions; ruff says so.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "countermark"
# Where torch is imported at the top of a file: what trains, attacks or traces a live model.
TORCH_ON_TOP = ("attacks/", "training/", "embedding/", "alignment/symmetries/tracing.py")
TRAINS = re.compile(
    r"schemes/(\w+_training|frozen_networks|convergence|\w+/(training\w*|networks|adversarial|"
    r"stego_generators|placement|surrogates|augmentation|readers))\.py"
)


def lint(configuration: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of a configuration file, in a process of its own."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--config"]
    return subprocess.run(
        [*command, str(configuration)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_product_only() -> None:
    written = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert written["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/countermark"]


def test_the_contracts_on_imports_are_kept() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("layers", "swapped"),
    [
        ('    "embedding",\n    "schemes",', '    "schemes",\n    "embedding",'),
        ('    "keys",\n    "_internal",', '    "_internal",\n    "keys",'),
        ('    "stamping",\n', ""),
    ],
    ids=["embedding below schemes", "keys below _internal", "a package without a layer"],
)  # fmt: skip
def test_other_layers_are_refused(tmp_path: Path, layers: str, swapped: str) -> None:
    written = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert layers in written
    changed = tmp_path / "pyproject.toml"
    changed.write_text(written.replace(layers, swapped, 1), encoding="utf-8")
    done = lint(changed)
    assert done.returncode == 1
    assert "imports run downwards BROKEN" in done.stdout


def imports_torch(source: str) -> bool:
    """Is torch imported when the module is, outside functions and `if TYPE_CHECKING`?"""
    found = []
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return any(re.match(r"(safetensors\.)?torch\b", each) for each in found)


def test_torch_stays_off_the_plain_path() -> None:
    on_top = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if imports_torch(path.read_text(encoding="utf-8"))
    }
    wrong = {e for e in on_top if not e.startswith(TORCH_ON_TOP) and not TRAINS.fullmatch(e)}
    assert wrong == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", True),
        ("from torch.nn import Module", True),
        ("from safetensors import torch", True),
        ("try:\n    import torch\nexcept ImportError: ...", True),
        ("class A:\n    import torch", True),
        ("def f():\n    import torch", False),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("import torchless", False),
    ],
)
def test_an_import_of_torch_is_seen(source: str, found: bool) -> None:
    assert imports_torch(source) is found


# --- no attack takes a key


def is_key(name: str, annotation: ast.expr | None) -> bool:
    """Is a parameter named as a key (`key`, `owner_keys`), or annotated with one (`Key | None`)?"""
    written = ast.unparse(annotation) if annotation else ""
    return bool({"key", "keys"} & set(name.split("_")) or re.search(r"Key(?![a-z])", written))


def parameters(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """What a statement of a class body asks its caller for; a dataclass field asks as well."""
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id, statement.annotation
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        name, arguments = statement.name, statement.args
        if name.startswith("_") and not name.endswith("__"):
            return
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        for argument in every:
            yield argument.arg, argument.annotation


def keys_taken(source: str) -> list[str]:
    """Methods and fields of classes that take a key, as `class, name`."""
    return [
        f"{node.name}, {name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        for name, annotation in parameters(statement)
        if is_key(name, annotation)
    ]


def test_no_attack_takes_a_key() -> None:
    for path in sorted((PACKAGE / "attacks").rglob("*.py")):
        assert keys_taken(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        ("class A:\n    def run(self, model, key): ...", ["A, key"]),
        ("class A:\n    def run(self, secret: Key | None): ...", ["A, secret"]),
        ("class A:\n    def cost(self, *, s: 'list[cm.Key]'): ...", ["A, s"]),
        ("class A:\n    async def run(self, *owner_keys): ...", ["A, owner_keys"]),
        ("class A:\n    def __call__(self, x: KeyMaterial): ...", ["A, x"]),
        ("class A:\n    fraction: float\n    secret: Key", ["A, secret"]),
        ("class A:\n    def run(self, *, keyboard: int = 0): ...\n    def _in(self, key): ...", []),
    ],
)
def test_a_key_that_an_attack_takes_is_seen(source: str, taken: list[str]) -> None:
    assert keys_taken(dedent(source)) == taken
