"""The pages of the documentation, read as a reader would type them.

The blocks of a page run in document order, in one process with one namespace, in an empty folder:

    ```python           runs
    ```console          its lines `$ countermark …` run and must exit 0, or N after `# exit N`
    ```python no-run    does not run, neither does `console no-run`

A command goes on behind a backslash; `NAME=value` may stand before it; `$(date -u +FORMAT)` is
what a shell makes of it, and `sleep N` sleeps. Other languages are text.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from loaded import run_loaded

from countermark.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
TIMEOUT = 1100  # seconds a page; below the 1200 of pytest, which could not say where it hung

# Pages that speak of the experiments of a clone, and what of it they find in their folder.
IN_A_CLONE = {"benchmark.md"}
CLONED = ("experiments", "tables", "results")
# Commands about the checkout or the shell: shown to people, not run. Any other must be countermark.
NOT_RUN = {"cd", "git", "make", "pip", "py", "python", "source"}
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
    if program in NOT_RUN:
        return None
    if program == "sleep":
        return {"source": f"import time; time.sleep({float(words[1])})", "line": line}
    if program != "countermark":
        raise PageError(f"{page}:{line}: $ {shown}: {program!r} is not countermark nor in NOT_RUN")
    if SHELL & set(words):
        raise PageError(f"{page}:{line}: $ {shown}: pipes and redirections are not understood")
    if unknown := [each for each in words if each.startswith("$") and not DATE.fullmatch(each)]:
        raise PageError(f"{page}:{line}: $ {shown}: {unknown[0]} is not understood")
    code = int(ends[1]) if ends else 0
    return {"line": line, "shown": shown, "words": words[1:], "env": env, "exit": code}


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
    ended = run_loaded(
        _typed, str(page), todo, timeout, program,
        folder=work, timeout=timeout, drawn_from=page.name,
    )  # fmt: skip
    if ended.code is None:
        return f"{page}: not done after {timeout} seconds\n{ended.said}"
    return None if ended.code == 0 else f"{page} failed:\n{ended.said}"


def _typed(
    page: str, todo: list[dict[str, Any]], timeout: float, program: Callable[..., Any]
) -> None:
    """Do the steps of a page, in this process where they are Python."""
    ends = time.monotonic() + timeout
    sys.modules["__main__"] = types.ModuleType("__main__")
    for step in todo:
        if "source" in step:
            _python(page, step)
        else:
            _command(page, step, ends - time.monotonic(), program)
        sys.stdout.flush()


def _python(page: str, step: dict[str, Any]) -> None:
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


def _command(page: str, step: dict[str, Any], left: float, program: Callable[..., Any]) -> None:
    words = [DATE.sub(lambda found: time.strftime(found[1], time.gmtime()), each)
             for each in step["words"]]  # fmt: skip
    done = run_loaded(
        program, words,
        folder=Path.cwd(), timeout=left, drawn_from=step["shown"], env=step["env"],
    )  # fmt: skip
    if done.code != step["exit"]:
        found = f"exit {done.code}, expected {step['exit']}"
        sys.exit(f"{done.said}\n{page}:{step['line']}: $ {step['shown']}: {found}")
