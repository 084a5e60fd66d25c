"""Runs the examples in the command line's help, found by walking the real command tree.

A command's help (its docstring) ends in a section `Example` or `Examples` whose lines
`countermark …` exit 0, or N after a trailing `# exit N`. They run in one folder, in ORDER.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_calls import Said, call, process
from loaded import run_loaded

from countermark.cli import main
from countermark.cli.app import COMMANDS
from countermark.cli.app import app as countermark_app
from countermark_lab.__main__ import main as lab_main
from countermark_lab.commands import app as lab_app

ROOT = Path(__file__).parents[2]

# Commands whose examples leave files for later ones; the others follow in the tree's order.
ORDER = (
    "embed", "stamp", "mark-images", "verify", "key show", "attack run", "claim keygen",
    "claim new", "claim sign", "ledger init",
)  # fmt: skip

# test_demo.py runs the example of `demo`, and looks at what it shows; `speed` takes minutes.
ELSEWHERE = {"demo", "speed"}
PROGRAMS = re.compile(r"(countermark|python -m countermark_lab) ")

HEADING = re.compile(r"^[ \t]*Examples?:?[ \t]*$", re.MULTILINE)
NOTE = re.compile(r"\s#\s.*$")
EXIT = re.compile(r"#\s*exit\s+(\d+)\s*$")
TIMEOUT = 600  # seconds an example


@dataclass(frozen=True)
class Example:
    """One line of a help text: the command it stands in, itself, and the exit it promises."""

    command: str
    shown: str
    exit: int

    @property
    def words(self) -> list[str]:
        return shlex.split(PROGRAMS.sub("", NOTE.sub("", self.shown), count=1))


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Full name and help of every command that does something, groups left out.

    typer brings its own copy of click, so the tree is known by its attributes, not its classes.
    """
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, "\n".join(filter(None, [command.help, command.epilog]))
        return
    for word, child in inner.items():
        if child.hidden:
            continue
        yield from leaves(child, f"{name} {word}".strip())


def examples(name: str, text: str) -> list[Example]:
    """The examples of one help text, backslashed lines joined; empty without the section."""
    heading = HEADING.search(text)
    section = re.sub(r"\\\n\s*", "", text[heading.end() :]) if heading else ""
    found = []
    for line in map(str.strip, section.splitlines()):
        if PROGRAMS.match(line):
            ends = EXIT.search(line)
            found.append(Example(name, line, int(ends[1]) if ends else 0))
    return found


def in_order(tree: dict[str, str], order: Sequence[str]) -> list[Example]:
    """All examples: those of the listed commands first, in the order of the list."""
    names = [*(name for name in order if name in tree), *(n for n in tree if n not in order)]
    return [example for name in names for example in examples(name, tree[name])]


def broken(tree: dict[str, str]) -> list[str]:
    """Commands without an example, and examples that show another command."""
    found = [
        f"{name}: no section `Example`" for name, text in tree.items() if not examples(name, text)
    ]
    for name, text in tree.items():
        shown = [example.words for example in examples(name, text)]
        if shown and not any(words[: len(name.split())] == name.split() for words in shown):
            found.append(f"{name}: none of its examples runs it")
    return found


def run(todo: list[Example], folder: Path, program: Callable[..., Any] = main) -> list[str]:
    """Runs the examples in a folder; what failed, with what it said."""
    failures = []
    for example in todo:
        ended = run_loaded(
            program, example.words, folder=folder, timeout=TIMEOUT, drawn_from=example.shown
        )
        if ended.code != example.exit:
            codes = f"exit {ended.code}, expected {example.exit}"
            failures.append(f"{example.command}: {example.shown}: {codes}\n{ended.said}")
    return failures


@pytest.fixture(scope="module")
def tree() -> dict[str, str]:
    """The real command line: name of each command to its help."""
    return dict(leaves(typer.main.get_command(countermark_app)))


def test_every_command_shows_an_example(tree: dict[str, str]) -> None:
    assert tree
    assert not broken(tree), "\n".join(["", *broken(tree)])


def test_every_example_runs(tree: dict[str, str], tmp_path: Path) -> None:
    """One test, not one an example: they build on each other, and xdist would part them."""
    here = {name: text for name, text in tree.items() if name not in ELSEWHERE}
    failures = run(in_order(here, ORDER), tmp_path)
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def test_every_example_of_the_laboratory_runs(tmp_path: Path) -> None:
    tree = dict(leaves(typer.main.get_command(lab_app)))
    assert not broken(tree), "\n".join(["", *broken(tree)])
    for part in ("experiments", "tables", "results"):
        shutil.copytree(ROOT / part, tmp_path / part)
    here = {name: text for name, text in tree.items() if name not in ELSEWHERE}
    failures = run(in_order(here, ()), tmp_path, lab_main)
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


# --- what the program's own help says, and what it answers to words that it does not know


def test_the_help_shows_every_command_in_a_group_on_a_full_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = call("--help")
    assert said.code == 0
    _, *panels = re.split(r"^(Mark|Verify|Evidence|Study):\n", said.out, flags=re.MULTILINE)
    shown = dict(zip(panels[::2], panels[1::2], strict=True))
    assert list(shown) == list(COMMANDS)
    for heading, commands in COMMANDS.items():
        lines = shown[heading].strip("\n").splitlines()
        assert {line.split()[0] for line in lines} == set(commands)
        assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_the_short_option_shows_the_help_of_every_command(tree: dict[str, str]) -> None:
    groups = {name.rpartition(" ")[0] for name in tree}
    for name in {*tree, *groups}:
        short = call(*name.split(), "-h")
        assert (short.code, short.err) == (0, "")
        assert short.out == call(*name.split(), "--help").out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("embde", "there is no command 'embde': the nearest is 'embed'"),
        ("mark images", "there is no command 'mark': the nearest is 'mark-images'"),
        ("claim timestmp", "there is no command 'timestmp': the nearest is 'timestamp'"),
        ("bnch", "there is no command 'bnch': there are: embed, stamp, advise, mark-images,"),
        (
            "stamp m.safetensors --ownr A",
            "No such option: --ownr (Possible options: --json, --owner)",
        ),
        ("schemes uchda", "there is no scheme 'uchda': the nearest is 'uchida'"),
        ("bench table", "python -m countermark_lab table"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(line: str, says: str) -> None:
    said = call(*line.split())
    assert (said.code, said.out) == (2, "")
    assert says in said.why
    assert "'bench'" not in said.why


def test_a_shell_completes_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_COUNTERMARK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "countermark claim sign")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert call() == Said(0, "sign\nsign-model\n", "")
    monkeypatch.setenv("_COUNTERMARK_COMPLETE", "complete_abacus")
    assert call().code == 2


def test_the_completion_script_is_printed_and_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The shell is named here, because none is found where the tests run without one.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    program = [sys.executable, "-m", "countermark"]
    printed = process([*program, "--show-completion", "bash"], tmp_path)
    assert (printed.code, printed.err) == (0, "")
    assert "_COUNTERMARK_COMPLETE=complete_bash" in printed.out
    assert process([*program, "--install-completion", "bash"], tmp_path).code == 0
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert script.read_text().strip() == printed.out.strip()


# --- the harness itself, on a made-up command line

app = typer.Typer()
keys = typer.Typer()
app.add_typer(keys, name="key")


@app.command()
def read(name: str, strict: bool = False) -> None:
    """Read a file.

    Example:
        countermark read made --strict   # the strict way
        countermark read \\
            absent   # exit 1
    """
    if not Path(name).exists():
        raise typer.Exit(1)


@app.command()
def make(name: str) -> None:
    """Make a file.

    Examples
    --------
        countermark make made
    """
    Path(name).touch(exist_ok=False)


@keys.command()
def show() -> None:
    """Show a key. Example code is elsewhere."""


@keys.command()
def lose() -> None:
    """Lose a key.

    Example:
        countermark make another
    """


def tiny_main(words: list[str]) -> None:
    app(words, prog_name="countermark")


@pytest.fixture
def tiny() -> dict[str, str]:
    """The tree of the made-up command line."""
    return dict(leaves(typer.main.get_command(app)))


def test_commands_are_found_in_groups_too(tiny: dict[str, str]) -> None:
    assert sorted(tiny) == ["key lose", "key show", "make", "read"]


def test_a_single_command_is_a_tree_as_well() -> None:
    single = typer.Typer()

    @single.command(help="Only one.\n\nExample:\n    countermark", epilog="countermark --help")
    def only() -> None: ...

    (name, text), *rest = leaves(typer.main.get_command(single))
    assert not rest
    assert [example.words for example in examples(name, text)] == [["--help"]]


def test_missing_and_foreign_examples_are_named(tiny: dict[str, str]) -> None:
    assert broken(tiny) == [
        "key show: no section `Example`",
        "key lose: none of its examples runs it",
    ]


def test_examples_run_in_the_given_order(tiny: dict[str, str], tmp_path: Path) -> None:
    assert run(in_order(tiny, ["make", "not yet written"]), tmp_path, tiny_main) == []


def test_a_failing_example_is_named(tiny: dict[str, str], tmp_path: Path) -> None:
    (failure,) = run(in_order(tiny, ["read", "make"]), tmp_path, tiny_main)
    assert failure.startswith(
        "read: countermark read made --strict   # the strict way: exit 1, expected 0"
    )
