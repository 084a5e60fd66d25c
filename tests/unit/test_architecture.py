"""Imports run downwards only, torch and its like stay off the plain path, no attack sees a key.

The rules are read from the source by `ast`, so that an import inside a function counts as well;
what stands under `if TYPE_CHECKING:` is never run and does not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "countermark"

# What may import what: only from a higher number to a lower one, or inside one package.
RANKS = {
    "_version": 0,
    "answers": 1,
    "errors": 0,
    "factories": 1,
    "key_dating": 1,
    "subject": 0,
    "test_result": 1,
    "files": 0,
    "pictures": 0,
    "progress": 0,
    "xof": 0,
    "merkle": 1,
    "message": 1,
    "outputs": 1,
    "passphrase": 1,
    "places": 1,
    "stats": 1,
    "key": 2,
    "nulls": 2,
    "remote": 2,
    "units": 2,
    "weights": 2,
    "alignment": 3,
    "hidden_units": 3,
    "verdict": 3,
    "claims": 4,
    "copies": 4,
    "embedding": 4,
    "steganalysis": 4,
    "loops": 5,
    "schemes": 5,
    "openings": 6,
    "report": 6,
    "stamping": 6,
    "readings": 6,
    "attacks": 7,
    "tracing": 7,
    "examine": 7,
    "bench": 8,
    "disputes": 8,
    "identify": 8,
    "web": 9,
    "cli": 10,
    "__main__": 11,
}
# A module that is one with its neighbour although the two are no package.
PART_OF = {
    "evidence": "nulls", "examine_aligned": "examine", "keyfile": "key", "limits": "verdict",
    "owners_word": "verdict", "telling": "verdict", "unmarked": "examine",
}  # fmt: skip
# Narrower than the ranks. A thief knows the algorithm and makes keys of his own, no more.
ONLY = {
    "claims": {
        "_version",
        "errors",
        "files",
        "key",
        "key_dating",
        "merkle",
        "nulls",
        "places",
        "progress",
        "stats",
        "verdict",
        "weights",
    },
    "attacks": {
        "errors",
        "factories",
        "files",
        "progress",
        "stats",
        "units",
        "weights",
        "schemes.base",
    },
    "loops": {"errors", "embedding", "files", "key"},
    "remote": {"answers", "errors", "files", "places", "progress", "subject", "xof"},
    "steganalysis": {"errors", "progress", "stats"},
}
# The attacks that make keys: those of the thief's own marks.
MAKES_KEYS = {
    "attacks.overwrite": {"key", "schemes"},
    "attacks.forge": {"key", "schemes"},
}
# Steganalysis looks at pictures and knows of no mark: the laboratory alone uses it.
NEVER = {"examine": {"embedding", "steganalysis"}, "schemes": {"steganalysis"}}
TORCH_ON_TOP = {"attacks", "bench", "embedding", "loops", "schemes.training", "units.tracing"}
TORCH = {"torch", "safetensors.torch"}
# Slow to load, and needed by few: imported where they are used.
INSIDE = {
    "alembic", "conseal", "fastapi", "httpx2", "model_signing", "onnx", "psycopg", "rfc3161_client",
    "scipy", "sklearn", "sqlalchemy", "starlette", "uvicorn",
}  # fmt: skip
# What needs a library as a whole is a module of its own, which others import inside functions.
HOMES = {
    "sqlalchemy": "claims.database", "alembic": "claims.migrations", "fastapi": "web",
    "starlette": "web", "uvicorn": "web",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module: who imports what, on which line, and if only when a function runs."""

    importer: str
    target: str
    line: int
    in_function: bool


def within(name: str, homes: Iterable[str]) -> bool:
    """Is the dotted name one of the homes, or inside one?"""
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def unit(module: str) -> str:
    """The row of the table that a module, named from the package on, belongs to."""
    first = module.partition(".")[0]
    return PART_OF.get(first, first)


class Reader(ast.NodeVisitor):
    """Collects the imports of one module as absolute names."""

    def __init__(self, module: str, is_package: bool, modules: set[str]) -> None:
        self.module, self.modules, self.depth = module, modules, 0
        self.parent = module.split(".") if is_package else module.split(".")[:-1]
        self.found: list[Import] = []

    def add(self, target: str, line: int) -> None:
        self.found.append(Import(self.module, target, line, self.depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.parent[: len(self.parent) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            is_module = inner in self.modules or inner in TORCH or unit_of(inner) in RANKS
            self.add(inner if is_module else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).split(".")[-1]
        first = node.args[0] if node.args else None
        if name in {"import_module", "__import__"} and isinstance(first, ast.Constant):
            self.add(str(first.value), node.lineno)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_function(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    # The names under which ast.NodeVisitor looks a visitor up.
    visit_FunctionDef = visit_AsyncFunctionDef = visit_function  # noqa: N815


def unit_of(target: str) -> str | None:
    """The unit that an absolute name `countermark.unit` names, None for anything longer."""
    parts = target.split(".")
    return unit(parts[1]) if len(parts) == 2 and parts[0] == "countermark" else None


def sources(package: Path) -> dict[str, Path]:
    """Module name, `countermark.…`, to file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(("countermark", *parts))] = path
    return found


def imports(package: Path) -> Iterator[tuple[Path, Import]]:
    """Every import of every module that counts."""
    modules = sources(package)
    for module, path in modules.items():
        reader = Reader(module, path.name == "__init__.py", set(modules))
        reader.visit(ast.parse(path.read_text(encoding="utf-8")))
        for found in reader.found:
            yield path, found


def broken_direction(found: Import) -> str | None:
    """The rule of the ranks that an import breaks, or None."""
    if not within(found.target, {"countermark"}):
        return None
    importer, target = (name.partition(".")[2] for name in (found.importer, found.target))
    if not importer:
        return None if found.in_function else "countermark/__init__.py is lazy: use _PLACES"
    if not target:
        return "import from the module that defines the name, not from countermark itself"
    above, below = unit(importer), unit(target)
    if unlisted := [name for name in (above, below) if name not in RANKS]:
        return f"{unlisted[0]} has no rank: add it to the table RANKS in {Path(__file__).name}"
    if above == below or within(target, MAKES_KEYS.get(importer, ())):
        return None
    return broken_rank(above, below, target)


def broken_rank(above: str, below: str, target: str) -> str | None:
    """The same for two units of the table."""
    if RANKS[below] >= RANKS[above]:
        return f"{above} (rank {RANKS[above]}) may not import {below} (rank {RANKS[below]})"
    if above in ONLY and not within(target, ONLY[above]):
        return f"{above} may import only {', '.join(sorted(ONLY[above]))}, not {target}"
    if within(target, NEVER.get(above, ())):
        return f"{above} may never import {target}"
    return None


def broken_weight(found: Import) -> str | None:
    """The rule on heavy libraries that an import breaks, or None."""
    if found.in_function:
        return None
    importer, library = found.importer.partition(".")[2], found.target.partition(".")[0]
    if library in HOMES and within(importer, {HOMES[library], "claims.migrations"}):
        return None
    if within(found.target, INSIDE):
        return f"{library} is imported inside functions only"
    if within(found.target, TORCH) and not within(importer, TORCH_ON_TOP):
        return f"torch is imported on top only in {', '.join(sorted(TORCH_ON_TOP))}"
    return None


def place(package: Path, path: Path, line: int) -> str:
    return f"{path.relative_to(package.parent)}:{line}"


def direction_violations(package: Path) -> list[str]:
    """Unlisted modules and imports that go upwards, as `file:line: rule`."""
    found = [
        f"{place(package, path, seen.line)}: {rule}"
        for path, seen in imports(package)
        if (rule := broken_direction(seen))
    ]
    for module, path in sources(package).items():
        name = unit(module.partition(".")[2])
        if name and name not in RANKS:
            found.append(f"{place(package, path, 1)}: {name} has no rank: add it to the table")
    return found


def weight_violations(package: Path) -> list[str]:
    """Imports of torch, scipy and their like where they are not wanted, as `file:line: rule`."""
    return [
        f"{place(package, path, seen.line)}: {rule}"
        for path, seen in imports(package)
        if (rule := broken_weight(seen))
    ]


def is_key(name: str, annotation: ast.expr | None) -> bool:
    """Is a parameter named as a key (`key`, `owner_keys`), or annotated with one (`Key | None`)?"""
    written = ast.unparse(annotation) if annotation else ""
    return bool({"key", "keys"} & set(name.split("_")) or re.search(r"Key(?![a-z])", written))


def parameters(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None, int]]:
    """What a statement of a class body asks its caller for; a dataclass field asks as well."""
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id, statement.annotation, statement.lineno
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        name, arguments = statement.name, statement.args
        if name.startswith("_") and not name.endswith("__"):
            return
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        for argument in every:
            yield argument.arg, argument.annotation, argument.lineno


def key_violations(package: Path) -> list[str]:
    """Methods and fields of attacks that take a key, as `file:line: rule`."""
    found = []
    for path in sorted((package / "attacks").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for name, annotation, line in (p for s in node.body for p in parameters(s)):
                if is_key(name, annotation):
                    where = place(package, path, line)
                    found.append(f"{where}: an attack never sees a key: {node.name}, {name}")
    return found


def test_imports_run_downwards() -> None:
    violations = direction_violations(PACKAGE)
    assert not violations, "\n".join(["", *violations])


def test_torch_and_scipy_stay_off_the_plain_path() -> None:
    violations = weight_violations(PACKAGE)
    assert not violations, "\n".join(["", *violations])


def test_no_attack_takes_a_key() -> None:
    violations = key_violations(PACKAGE)
    assert not violations, "\n".join(["", *violations])


# --- the checker itself: a check that cannot fail checks nothing

CLEAN = {
    "__init__.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from countermark.cli import main
        def __getattr__(name):
            from countermark import stats
    """,
    "errors.py": "import math",
    "stats.py": "import numpy as np\ndef f():\n    import scipy.stats",
    "message.py": "from countermark.xof import Stream",
    "xof.py": "",
    "key.py": "from countermark import message\ndef save():\n    from .keyfile import save_key",
    "keyfile.py": "from countermark.key import Key",
    "weights.py": "def save():\n    from safetensors.torch import save_file",
    "verdict.py": "from . import stats, key",
    "embedding.py": """
        import torch
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from countermark.schemes.base import Scheme
    """,
    "schemes/__init__.py": "from countermark.schemes import base",
    "schemes/base.py": "def embed():\n    from countermark.embedding import Embedding",
    "schemes/training/uchida.py": "import torch.nn as nn\nfrom ..base import Scheme",
    "attacks/base.py": "from torch import nn\nfrom countermark.schemes.base import Scheme",
    "attacks/prune.py": """
        from .base import Attack
        from .. import errors
        class Prune(Attack):
            fraction: float
            def run(self, model: Module, *, keyboard: int = 0): ...
            def _inner(self, key): ...
    """,
    "loops/hf.py": "from countermark.embedding import Embedding",
    "steganalysis/ats.py": """
        from countermark.stats import holm
        from countermark.steganalysis.spam import spam
        def fit():
            import sklearn.svm
    """,
    "examine.py": "from countermark import schemes, verdict, weights, key",
    "claims/database.py": "import sqlalchemy",
    "bench/run.py": "import torch\nfrom countermark import attacks, examine, steganalysis",
    "cli.py": "from countermark.bench import run",
}
DIRECTION = [
    ("stats.py", "import countermark.key", 1, "stats (rank 1) may not import key (rank 2)"),
    ("stats.py", "def f():\n    from . import verdict", 2, "may not import verdict"),
    (
        "message.py",
        "\nfrom countermark.stats import holm",
        2,
        "message (rank 1) may not import stats",
    ),
    ("verdict.py", "from countermark.schemes.base import Scheme", 1, "may not import schemes"),
    ("schemes/base.py", "from ..attacks import prune", 1, "may not import attacks (rank 7)"),
    ("schemes/base.py", "from ...countermark import cli", 1, "may not import cli"),
    ("attacks/prune.py", "from countermark import verdict", 1, "attacks may import only"),
    ("attacks/prune.py", "from countermark.key import Key", 1, "not key"),
    ("attacks/prune.py", "from countermark.keyfile import load_key", 1, "not keyfile"),
    ("attacks/prune.py", "from countermark.schemes import Uchida", 1, "not schemes"),
    ("attacks/prune.py", "from countermark.claims import Claim", 1, "may import only"),
    ("loops/hf.py", "from countermark.keyfile import load_key", 1, "not keyfile"),
    ("loops/hf.py", "from countermark.schemes.base import Scheme", 1, "may not import schemes"),
    ("examine.py", "from countermark.embedding import Embedding", 1, "never import embedding"),
    ("examine.py", "from countermark.attacks.prune import Prune", 1, "may not import attacks"),
    ("examine.py", "from countermark.steganalysis.ats import ats", 1, "examine may never import"),
    ("schemes/base.py", "from countermark.steganalysis import ats", 1, "may never import"),
    ("attacks/prune.py", "from countermark.steganalysis import ats", 1, "not steganalysis"),
    ("embedding.py", "from countermark import steganalysis", 1, "may not import steganalysis"),
    ("steganalysis/ats.py", "from countermark.key import Key", 1, "not key"),
    ("steganalysis/ats.py", "from countermark.xof import Stream", 1, "not xof"),
    ("steganalysis/ats.py", "from countermark.bench.data import load_data", 1, "may not import"),
    ("cli.py", "import importlib\nimportlib.import_module('countermark.__main__')", 2, "__main__"),
    ("cli.py", "from countermark import Uchida", 1, "the module that defines the name"),
    ("cli.py", "import countermark as cm", 1, "the module that defines the name"),
    ("__init__.py", "from countermark.key import Key", 1, "is lazy"),
    ("__init__.py", "try:\n    from . import key\nexcept ImportError: ...", 2, "is lazy"),
    ("helpers.py", "", 1, "helpers has no rank: add it to the table"),
    ("rooms/app.py", "", 1, "rooms has no rank: add it to the table"),
    (
        "key.py",
        "if TYPE_CHECKING:\n    from . import cli\nelse:\n    from . import verdict",
        4,
        "may not import verdict",
    ),
]
WEIGHT = [
    ("verdict.py", "import torch", 1, "torch is imported on top only in"),
    ("key.py", "from torch.nn import Module", 1, "torch is imported on top"),
    ("weights.py", "from safetensors.torch import save_file", 1, "torch is imported on top"),
    ("weights.py", "from safetensors import torch", 1, "torch is imported on top"),
    ("schemes/base.py", "class A:\n    import torch", 2, "torch is imported on top"),
    ("cli.py", "try:\n    import torch\nexcept ImportError: ...", 2, "torch is imported on top"),
    ("bench/run.py", "from scipy import stats", 1, "scipy is imported inside functions only"),
    ("embedding.py", "import scipy", 1, "scipy is imported inside"),
    ("xof.py", "from httpx2 import URL", 1, "httpx2 is imported inside"),
    ("steganalysis/ats.py", "from sklearn.svm import SVC", 1, "sklearn is imported inside"),
    ("steganalysis/ats.py", "import conseal", 1, "conseal is imported inside functions only"),
    ("steganalysis/ats.py", "import torch", 1, "torch is imported on top only in"),
    ("claims/ledger.py", "from sqlalchemy import select", 1, "sqlalchemy is imported inside"),
    ("cli.py", "from fastapi import FastAPI", 1, "fastapi is imported inside functions only"),
    ("web/app.py", "import torch", 1, "torch is imported on top only in"),
]
KEYS = [
    ("attacks/prune.py", "class A:\n    def run(self, model, key): ...", 2, "A, key"),
    ("attacks/prune.py", "class A:\n    def run(self, secret: Key | None): ...", 2, "A, secret"),
    ("attacks/prune.py", "class A:\n    def cost(self, *, s: 'list[cm.Key]'): ...", 2, "A, s"),
    ("attacks/prune.py", "class A:\n    async def run(self, *owner_keys): ...", 2, "A, owner_keys"),
    ("attacks/prune.py", "class A:\n    def __call__(self, x: KeyMaterial): ...", 2, "A, x"),
    ("attacks/prune.py", "class A:\n    fraction: float\n    secret: Key", 3, "A, secret"),
]


def tree(root: Path, changed: dict[str, str]) -> Path:
    """A small countermark in a folder of its own."""
    package = root / "countermark"
    for name, source in (CLEAN | changed).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source), encoding="utf-8")
    return package


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    package = tree(tmp_path, {})
    assert direction_violations(package) == []
    assert weight_violations(package) == []
    assert key_violations(package) == []


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        (rule, case)
        for rule, cases in (
            (direction_violations, DIRECTION),
            (weight_violations, WEIGHT),
            (key_violations, KEYS),
        )
        for case in cases
    ],
)
def test_a_violation_names_file_line_and_rule(
    tmp_path: Path, rule: Callable[[Path], list[str]], case: tuple[str, str, int, str]
) -> None:
    name, source, line, message = case
    violations = rule(tree(tmp_path, {name: source}))
    assert len(violations) == 1, violations
    assert violations[0].startswith(f"countermark/{name}:{line}: ")
    assert message in violations[0]
