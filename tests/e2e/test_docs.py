"""Runs the documentation: every python and console block of README.md and docs/**/*.md.

The blocks of a page run in document order, in one process with one namespace, in an empty folder:

    ```python           runs
    ```console          its lines `$ countermark …` run and must exit 0, or N after `# exit N`
    ```python no-run    does not run, neither does `console no-run`; ALLOWED_SKIPS says why

A command goes on behind a backslash; `NAME=value` may stand before it. Other languages are text.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
TIMEOUT = 280  # seconds a page; below the 300 of pytest, which could not say where it hung

# "page: first line of the block" -> why nobody can run it here.
ALLOWED_SKIPS: Mapping[str, str] = {}
# Pages that speak of the experiments of a clone, and what of it they find in their folder.
IN_A_CLONE = {"benchmark.md"}
CLONED = ("experiments", "tables", "results")
# Commands about the checkout or the shell: shown to people, not run. Any other must be countermark.
NOT_RUN = {"cd", "git", "make", "pip", "py", "python", "source"}
SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}

FENCE = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|~{3,})\s*(?P<info>[^`]*)$")
EXIT = re.compile(r"\s#\s*exit\s+(\d+)\s*$")

# Compiles each block under its page's name and line, so that a traceback shows the page itself; its
# own names begin with `_`, so that a block which forgets an import does not find the driver's.
DRIVER = """
import json as _json, os as _os, subprocess as _subprocess, sys as _sys, traceback as _traceback
with open(_sys.argv.pop(), encoding="utf-8") as _file:
    _page, _steps = _json.load(_file)

def _line_of(error, start):
    if isinstance(error, SyntaxError) and error.filename == _page:
        return error.lineno
    seen = [f.lineno for f in _traceback.extract_tb(error.__traceback__) if f.filename == _page]
    return seen[-1] if seen else start

def _python(step):
    try:
        exec(compile("\\n" * step["line"] + step["source"], _page, "exec"), globals())
    except BaseException as error:
        _traceback.print_exc()
        name = type(error).__name__
        _sys.exit(f"{_page}:{_line_of(error, step['line'])}: python block: {name}: {error}")

def _command(step):
    done = _subprocess.run(
        [_sys.executable, "-m", "countermark", *step["words"]],
        env=_os.environ | step["env"], stdin=_subprocess.DEVNULL, stdout=_subprocess.PIPE,
        stderr=_subprocess.STDOUT, text=True,
    )
    if done.returncode != step["exit"]:
        print(done.stdout)
        found = f"exit {done.returncode}, expected {step['exit']}"
        _sys.exit(f"{_page}:{step['line']}: $ {step['shown']}: {found}")

for _step in _steps:
    (_python if "source" in _step else _command)(_step)
    _sys.stdout.flush()
"""


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
    if program != "countermark":
        raise PageError(f"{page}:{line}: $ {shown}: {program!r} is not countermark nor in NOT_RUN")
    if SHELL & set(words):
        raise PageError(f"{page}:{line}: $ {shown}: pipes and redirections are not understood")
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


def run_page(page: Path, folder: Path) -> str | None:
    """Runs a page in `folder/page`; None when all went well, else what to tell its author."""
    try:
        todo = steps(page)
    except PageError as error:
        return str(error)
    if not todo:
        return None
    work, script = folder / "page", folder / "steps.json"
    work.mkdir()
    if page.name in IN_A_CLONE:
        for part in CLONED:
            shutil.copytree(ROOT / part, work / part)
    script.write_text(json.dumps([str(page), todo]), encoding="utf-8")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    env = os.environ | fixed | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(script)],
        cwd=work,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a command that hangs can be ended with its driver
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return f"{page}: not done after {TIMEOUT} seconds\n{said}"
    return None if process.returncode == 0 else f"{page} failed:\n{said}"


def skips(pages: list[Path], root: Path) -> list[str]:
    """The blocks that do not run, as `page: first line`."""
    return [
        f"{page.relative_to(root)}: {block.text.strip().partition(chr(10))[0]}"
        for page in pages
        for block in blocks(page)
        if block.skipped
    ]


def each_of(pages: list[Path]) -> pytest.MarkDecorator:
    """A test for each of these pages."""
    return pytest.mark.parametrize("page", pages, ids=[str(p.relative_to(ROOT)) for p in pages])


@each_of(PAGES[::2])  # the others are in test_docs_others.py, for another worker
def test_page_runs(page: Path, tmp_path: Path) -> None:
    failure = run_page(page, tmp_path)
    if failure:
        pytest.fail(failure, pytrace=False)


def test_each_skipped_block_is_justified(capsys: pytest.CaptureFixture[str]) -> None:
    found = skips(PAGES, ROOT)
    with capsys.disabled():
        reasons = [f"\n  {skip}: {ALLOWED_SKIPS.get(skip, 'NOT ALLOWED')}" for skip in found]
        sys.stdout.write(
            f"\n{len(found)} of the documentation's blocks do not run{''.join(reasons)}\n"
        )
    assert set(found) == set(ALLOWED_SKIPS), "ALLOWED_SKIPS and the pages differ"


# --- the harness itself


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
    return page


def test_blocks_share_a_namespace_and_a_folder(tmp_path: Path) -> None:
    text = """
        ```python
        import os
        from dataclasses import dataclass
        from pathlib import Path

        @dataclass
        class Point:
            x: int

        assert not list(Path.cwd().iterdir()) and os.environ["NO_COLOR"] == "1"
        Path("made").write_text("x")
        ```

        1. In a list, of another language, and a page about pages:

            ```python
            assert Point(3).x == 3 and Path("made").exists()
            ```

        ```text
        $ countermark nonsense
        ```

        ````markdown
        ```python
        assert False
        ```
        ````

        ~~~python no-run
        assert False
        ~~~

        ```console
        $ make all   # only shown
        some output
        $ pip install countermark | cat
        ```
        """
    page = page_of(tmp_path, text)
    assert run_page(page, tmp_path) is None
    assert skips([page], tmp_path) == ["page.md: assert False"]


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("x = 1\nassert x == 2", 5, "AssertionError"),
        ("def f():\n    raise OSError('gone')\nf()", 5, "OSError: gone"),
        ("import json\njson.loads('{')", 5, "JSONDecodeError"),
        ("x = (", 4, "SyntaxError"),
        ("\nPath('.')", 5, "NameError"),
        ("raise SystemExit(0)", 4, "SystemExit"),
    ],
)
def test_a_failing_python_block_names_page_and_line(
    tmp_path: Path, body: str, line: int, message: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n```python\n{body}\n```\n", encoding="utf-8")
    failure = run_page(page, tmp_path)
    assert failure is not None
    assert failure.splitlines()[-1].startswith(f"{page}:{line}: python block: {message}")


@pytest.fixture
def fake_countermark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, found first: it prints its arguments and exits as it is told."""
    package = tmp_path / "fake" / "countermark"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    code = """
        import os, sys
        from pathlib import Path
        with Path("log").open("a") as log:
            log.write(" ".join([os.environ.get("GREETING", "-"), *sys.argv[1:]]) + "\\n")
        sys.stdout.write("said " + sys.argv[1])
        sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
        """
    (package / "__main__.py").write_text(dedent(code), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "nowhere")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.usefixtures("fake_countermark")
def test_commands_run_between_the_python_blocks(tmp_path: Path) -> None:
    text = """
        ```console
        $ countermark one
        said one
        $ countermark "two words" \\
              3   # exit 3
        $ GREETING=hello countermark four   # a comment
        ```

        ```python
        from pathlib import Path
        lines = Path("log").read_text().splitlines()
        assert lines == ["- one", "- two words 3", "hello four"], lines
        ```
        """
    assert run_page(page_of(tmp_path, text), tmp_path) is None


@pytest.mark.usefixtures("fake_countermark")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("countermark one 2", ":2: $ countermark one 2: exit 2, expected 0"),
        ("countermark one  # exit 1", ":2: $ countermark one  # exit 1: exit 0, expected 1"),
        ("countermrk one", ":2: $ countermrk one: 'countermrk' is not countermark nor in NOT_RUN"),
        ("countermark one | cat", ":2: $ countermark one | cat: pipes"),
    ],
)
def test_a_failing_command_names_page_and_line(tmp_path: Path, command: str, message: str) -> None:
    page = page_of(tmp_path, f"```console\n$ {command}\n```\n")
    failure = run_page(page, tmp_path)
    assert failure is not None
    assert f"{page}{message}" in failure
    assert ("exit" not in message) or "said one" in failure


def test_an_open_block_and_a_hanging_page_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = run_page(page_of(tmp_path, "text\n\n```python\nx = 1\n"), tmp_path)
    assert failure is not None
    assert "page.md:3: a block is opened" in failure
    monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 0.5)
    slow = page_of(tmp_path, "```python\nimport time\ntime.sleep(60)\n```\n")
    assert "not done after" in str(run_page(slow, tmp_path))
