"""The pages of the documentation, read as a reader would type them.

The blocks of a page run in document order in an empty folder, those in Python in one process:

    ```python           runs
    ```console          its lines `$ countermark …` run and must exit 0, or N after `# exit N`
    ```python no-run    does not run, neither does `console no-run`

A command goes on behind a backslash; `NAME=value` may stand before it; `$(date -u +FORMAT)` is
what a shell makes of it, and `sleep N` sleeps. Other languages are text.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import dedent
from typing import Any

from loaded import Loaded, run_loaded, start_loaded

from countermark.cli import main
from countermark_lab.__main__ import main as lab_main

ROOT = Path(__file__).parents[2]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
TIMEOUT = 1100  # seconds a page; below the 1200 of pytest, which could not say where it hung

# Pages that speak of the experiments of a clone, and what of it they find in their folder.
IN_A_CLONE = {"benchmark.md"}
CLONED = ("experiments", "tables", "results")
# Commands about the checkout or the shell: shown to people, not run. Any other must be countermark.
NOT_RUN = {"cd", "git", "make", "pip", "py", "python", "source"}
LAB = ["python", "-m", "countermark_lab"]
SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}

FENCE = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|~{3,})\s*(?P<info>[^`]*)$")
DATE = re.compile(r"\$\(date -u \+([^)]*)\)")
EXIT = re.compile(r"\s#\s*exit\s+(\d+)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its fence (from 1), its info string and its text."""

    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def skipped(self) -> bool:
        return self.language in {"python", "console"} and "no-run" in self.info.split()


class PageError(Exception):
    """A page that cannot be read as its author meant it."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a fence closes at its own mark or a longer one."""
    found: list[Block] = []
    start, opened, lines = 0, None, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if opened is None:
            if match:
                start, opened, lines = number, match, []
        elif match and not match["info"] and match["mark"].startswith(opened["mark"]):
            text = dedent("\n".join(lines))
            found.append(Block(start, opened["info"].strip(), text))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise PageError(f"{page}:{start}: a block is opened and never closed")
    return found


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """Line number and text of each `$ ` command of a block, its backslashed lines joined."""
    numbered = enumerate(block.text.split("\n"), block.line + 1)
    for number, line in numbered:
        if line.startswith("$ "):
            joined = line[2:]
            while joined.endswith("\\"):
                joined = joined[:-1] + next(numbered, (0, ""))[1].strip()
            yield number, joined


def command_step(page: Path, line: int, shown: str) -> dict[str, object] | None:
    """A command as a step of the driver; None for one that is only shown."""
    ends = EXIT.search(shown)
    words = shlex.split(re.sub(r"\s#\s.*$", "", shown))
    env = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        name, _, env[name] = words.pop(0).partition("=")
    program = words[0] if words else ""
    in_lab = words[:3] == LAB
    if program in NOT_RUN and not in_lab:
        return None
    if program == "sleep":
        return {"source": f"import time; time.sleep({float(words[1])})", "line": line}
    if program != "countermark" and not in_lab:
        raise PageError(f"{page}:{line}: $ {shown}: {program!r} is not countermark nor in NOT_RUN")
    if SHELL & set(words):
        raise PageError(f"{page}:{line}: $ {shown}: pipes and redirections are not understood")
    if unknown := [each for each in words if each.startswith("$") and not DATE.fullmatch(each)]:
        raise PageError(f"{page}:{line}: $ {shown}: {unknown[0]} is not understood")
    code = int(ends[1]) if ends else 0
    typed = words[3:] if in_lab else words[1:]
    return {
        "line": line, "shown": shown, "words": typed, "env": env, "exit": code, "lab": in_lab,
    }  # fmt: skip


def steps(page: Path) -> list[dict[str, object]]:
    """What the driver does for a page, in document order."""
    found: list[dict[str, object]] = []
    for block in blocks(page):
        if block.skipped:
            continue
        if block.language == "python":
            found.append({"line": block.line, "source": block.text})
        if block.language == "console":
            made = [command_step(page, line, shown) for line, shown in commands(block)]
            found.extend(step for step in made if step)
    return found


def run_page(
    page: Path, folder: Path, *, timeout: float = TIMEOUT, program: Callable[..., Any] = main
) -> str | None:
    """Runs a page in `folder/page`; None when all went well, else what to tell its author."""
    try:
        todo = steps(page)
    except PageError as error:
        return str(error)
    if not todo:
        return None
    work = folder / "page"
    work.mkdir()
    if page.name in IN_A_CLONE:
        for part in CLONED:
            shutil.copytree(ROOT / part, work / part)
    ends = time.monotonic() + timeout
    ours, theirs = Pipe()
    with start_loaded(
        _type_sources, str(page), theirs, folder=work, drawn_from=page.name
    ) as reader:
        theirs.close()
        for step in todo:
            left = ends - time.monotonic()
            if "source" in step:
                failure = _type_source(page, step, reader, ours, left)
            else:
                failure = _type_command(page, step, work, left, program)
            if failure:
                return failure
        ours.close()  # nothing more is to come
        ended = reader.wait(ends - time.monotonic())
    return None if ended.code == 0 else f"{page} failed at its end:\n{ended.said}"


def _type_source(
    page: Path, step: dict[str, Any], reader: Loaded, asking: Connection, left: float
) -> str | None:
    """Let the page's Python process run a block; None when all went well."""
    asking.send(step)
    if not asking.poll(left):
        return f"{page}:{step['line']}: not done in time\n{reader.wait(0).said}"
    try:
        asking.recv()
    except EOFError:
        return f"{page} failed:\n{reader.wait(60).said}"
    return None


def _type_sources(page: str, asked: Connection) -> None:
    """Run the Python blocks that are asked for, until one fails or no more are to come."""
    sys.modules["__main__"] = types.ModuleType("__main__")
    with contextlib.suppress(EOFError):
        while True:
            _run_source(page, asked.recv())
            sys.stdout.flush()
            asked.send(True)


def _run_source(page: str, step: dict[str, Any]) -> None:
    """Compiled under its page's name and line, so that a traceback shows the page itself."""
    try:
        code = compile("\n" * step["line"] + step["source"], page, "exec")
        exec(code, vars(sys.modules["__main__"]))  # noqa: S102 - the documentation's own
    except BaseException as error:
        traceback.print_exc()
        where = f"{page}:{_line_of(error, page, step['line'])}"
        sys.exit(f"{where}: python block: {type(error).__name__}: {error}")


def _line_of(error: BaseException, page: str, start: int) -> int:
    if isinstance(error, SyntaxError) and error.filename == page:
        return error.lineno or start
    seen = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == page]
    return (seen[-1] if seen else None) or start


def _type_command(
    page: Path, step: dict[str, Any], work: Path, left: float, program: Callable[..., Any]
) -> str | None:
    """Run a command of a page in the page's folder; None when it exits as the page says."""
    words = [DATE.sub(lambda found: time.strftime(found[1], time.gmtime()), each)
             for each in step["words"]]  # fmt: skip
    done = run_loaded(
        lab_main if step["lab"] else program,
        words,
        folder=work,
        timeout=left,
        drawn_from=step["shown"],
        env=step["env"],
    )
    if done.code == step["exit"]:
        return None
    found = f"exit {done.code}, expected {step['exit']}"
    return f"{done.said}\n{page}:{step['line']}: $ {step['shown']}: {found}"
