"""Files are there whole or not at all; JSON of strangers has one reading only."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from keys import one_line
from pydantic import BaseModel

from countermark._internal.files import (
    parse_document,
    parse_json,
    replace_file,
    write_bytes,
    write_folder,
)
from countermark.errors import CountermarkError, MissingExtraError, make_printable


def test_a_file_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "f"
    with replace_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_is_as_it_was(
    tmp_path: Path, old: bytes | None, error: type[BaseException]
) -> None:
    path = tmp_path / "f"
    if old is not None:
        path.write_bytes(old)

    def interrupted() -> None:
        with replace_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_block_that_writes_nothing_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replace_file(path):
        pass
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="Input/output"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert (target.read_bytes(), link.read_bytes()) == (b"old", b"new")
    assert not link.is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_folder_is_written_whole_and_for_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "k"
    write_folder(folder, {"a": b"1", "b": b""})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b""}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_is_never_written_over_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "folder", "link"):
        with pytest.raises(FileExistsError):
            write_folder(tmp_path / name, {"a": b"1"})
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "k"
    folder.mkdir()
    (folder / "theirs").touch()
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(OSError, match="not empty"):
        write_folder(folder, {"a": b"1"})
    assert list(tmp_path.rglob("*")) == [folder, folder / "theirs"]


@pytest.mark.parametrize("content", [b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', b"7", b" [] "])
def test_json_is_parsed(content: bytes) -> None:
    assert parse_json(content) == json.loads(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        (b'[[{"b": {"a": 1, "a": 2}}]]', "'a' stands twice"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[" * 100_000, "nests too deeply"),
        (b"9" * 5000, "4300"),
        (b'"\xff"', "decode"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
    ],
    ids=range(10),
)
def test_json_with_two_readings_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(content)


def test_numbers_that_are_not_finite_pass_where_they_are_let() -> None:
    assert str(parse_json(b"[NaN, Infinity, -Infinity]", non_finite=True)) == "[nan, inf, -inf]"
    with pytest.raises(ValueError, match="stands twice"):
        parse_json(b'{"a": NaN, "a": 1}', non_finite=True)


def test_a_name_that_stands_twice_among_many_is_found_in_linear_time() -> None:
    names = [f'"{number}": 0' for number in [*range(300_000), 299_999]]
    with pytest.raises(ValueError, match="'299999' stands twice"):  # or not before the time-out
        parse_json(f"{{{', '.join(names)}}}".encode())


def test_errors_are_one_printable_line_whatever_they_quote() -> None:
    said = one_line(CountermarkError("a\nb\r\x1b[2J\u202e\ud800 ü → 🔑" + "x" * 10_000))
    assert said.startswith("a\\nb\\r\\x1b[2J\\u202e\\ud800 ü → 🔑xxx")
    assert said.endswith("…")
    assert make_printable("as it is: ⌊½⌋") == "as it is: ⌊½⌋"
    assert "countermark[report]" in one_line(MissingExtraError("a report", "report"))


def test_json_of_too_many_parts_is_not_parsed() -> None:
    class Anything(BaseModel):
        a: list[int]

    most = b'{"a":[' + b"1," * ((1 << 21) - 2) + b"1]}"
    assert len(parse_document(Anything, most).a) == (1 << 21) - 1
    with pytest.raises(ValueError, match="more than 2,097,152 parts"):
        parse_document(Anything, most.replace(b"1]", b"1,1]"))
