"""Runs the documentation: every python and console block of README.md and docs/**/*.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest
from pages import PAGES, ROOT, blocks, run_page

# "page: first line of the block" -> why nobody can run it here.
ALLOWED_SKIPS: Mapping[str, str] = {}


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


def fake(words: list[str]) -> None:
    """A stand-in for the command line: it prints its arguments and exits as it is told."""
    with Path("log").open("a", encoding="utf-8") as log:
        log.write(" ".join([os.environ.get("GREETING", "-"), *words]) + "\n")
    sys.stdout.write("said " + words[0])
    sys.exit(int(words[1]) if len(words) > 1 else 0)


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
    assert run_page(page_of(tmp_path, text), tmp_path, program=fake) is None


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
    failure = run_page(page, tmp_path, program=fake)
    assert failure is not None
    assert f"{page}{message}" in failure
    assert ("exit" not in message) or "said one" in failure


def test_an_open_block_and_a_hanging_page_fail(tmp_path: Path) -> None:
    failure = run_page(page_of(tmp_path, "text\n\n```python\nx = 1\n"), tmp_path)
    assert failure is not None
    assert "page.md:3: a block is opened" in failure
    slow = page_of(tmp_path, "```python\nimport time\ntime.sleep(60)\n```\n")
    assert "not done in time" in str(run_page(slow, tmp_path, timeout=0.5))
