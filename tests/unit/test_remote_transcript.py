"""A transcript says what was asked and answered, can be asked again, and may be a forger's."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import mutated, one_line

from countermark.errors import ConfigError, SuspectError
from countermark.keys.streams import frame
from countermark.predictors.remote import RemoteOptions, Transcript, connect
from suspect_server import Said, Seen, Suspects, label_of, labels_of, some_images

pytestmark = pytest.mark.usefixtures("quick")


def suspect(seen: Seen) -> Any:
    """Labels, but for images that begin with a 0: of them it knows nothing."""
    rows = [np.array(row) for row in seen.json["inputs"]]
    return {"predictions": [label_of(row) if row.flat[0] else "what?" for row in rows]}


def images_of_these_tests() -> Any:
    images = some_images(5)
    images[:, 0, 0, 0] = [1, 0, 2, 0, 3]
    return images


EXPECTED = [
    label if first else -1
    for label, first in zip(labels_of(images_of_these_tests()), [1, 0, 2, 0, 3], strict=True)
]


@pytest.fixture
def made(suspects: Suspects) -> Transcript:
    with connect(suspects.answer(suspect), RemoteOptions("mlflow", batch=3)) as endpoint:
        assert endpoint(images_of_these_tests()).tolist() == EXPECTED
    return endpoint.transcript


def test_it_records_digests_of_what_was_sent_and_came(suspects: Suspects) -> None:
    bodies: list[bytes] = []
    answer = b'{"predictions": [4]}'
    url = suspects.answer(lambda seen: bodies.append(seen.body) or Said(answer))
    images = some_images(1)
    with connect(url, RemoteOptions("mlflow")) as endpoint:
        endpoint(images)
    (entry,) = endpoint.transcript.entries
    framed = frame(b"uint8 [3, 4, 5]", images[0].tobytes())
    assert entry.model_dump() == {
        "image": hashlib.sha256(framed).hexdigest(),
        "request": hashlib.sha256(bodies[0]).hexdigest(),
        "answer": hashlib.sha256(answer).hexdigest(),
        "status": 200, "attempts": 1, "label": 4, "why": None,
    }  # fmt: skip


def test_it_comes_back_from_a_file_and_answers_without_network(
    made: Transcript, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "suspect.transcript.json"
    made.save(path)
    loaded = Transcript.load(path)
    assert loaded == made
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest() == made.digest
    images = images_of_these_tests()
    assert loaded.make_replay()(images).tolist() == EXPECTED
    assert loaded.make_replay()(images[[4, 0, 0]]).tolist() == [EXPECTED[n] for n in (4, 0, 0)]
    assert loaded.make_replay()(images[:0]).shape == (0,)
    assert loaded.make_replay()(images).dtype == np.int64
    written = json.loads(path.read_bytes())
    assert written["type"] == "countermark/transcript/v1"
    assert written["started"].endswith("+00:00")
    assert [entry["label"] for entry in written["entries"]] == [
        None if label < 0 else label for label in EXPECTED
    ]


def test_other_images_are_not_in_it(made: Transcript) -> None:
    replay = made.make_replay()
    with pytest.raises(SuspectError) as raised:
        replay(some_images(3, seed=9))
    assert "no answer for 3 of 3 image(s)" in one_line(raised.value)
    assert "use the key that it was made with" in str(raised.value)
    images = images_of_these_tests()
    with pytest.raises(SuspectError, match="no answer for 5 of 5"):  # the bytes are the same
        replay(images.reshape(5, 3, 5, 4))
    with pytest.raises(ConfigError, match="expected images as uint8"):
        replay(images.astype(np.float32))


def test_an_image_that_was_asked_twice_has_its_first_label(suspects: Suspects) -> None:
    answers = iter([Said(b"no", 500), {"predictions": [1]}, {"predictions": [2]}])
    first, second = some_images(1), some_images(1, seed=1)
    with connect(suspects.answer(lambda _: next(answers)), RemoteOptions("mlflow")) as endpoint:
        assert [int(endpoint(each)[0]) for each in (first, second, first)] == [-1, 1, 2]
    replay = endpoint.transcript.make_replay()
    assert replay(np.concatenate([first, second])).tolist() == [-1, 1]


def test_it_is_never_written_over_anything(made: Transcript, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "folder", "link"):
        with pytest.raises(ConfigError, match="exists: choose another name"):
            made.save(tmp_path / name)
    assert (tmp_path / "file").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 3


def test_its_repr_is_short(made: Transcript) -> None:
    assert "image" not in repr(made).replace("images", "")
    assert len(repr(made)) < 1000


def changed(made: Transcript, *path: Any, to: Any) -> bytes:
    """The file with one value changed."""
    document = json.loads(made.to_bytes())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return json.dumps(document).encode()


CHANGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("type",), "countermark/transcript/v2", "it is of version 'v2', this countermark reads v1"),
    (("type",), "countermark/key/v1", "type: Input should be 'countermark/transcript/v1'"),
    (("colour",), 1, "colour: Extra inputs are not permitted"),
    (("entries", 0, "colour\n\x1b"), 1, "entries.0.colour\\n\\x1b: Extra inputs"),
    (("entries", 1, "label"), 3, "entries.1: Value error, expected a label, or why there is none"),
    (("entries", 0, "why"), "so", "entries.0: Value error, expected a label, or why there is none"),
    (("entries", 0, "label"), 2**31, "entries.0.label"),
    (("entries", 0, "label"), -1, "entries.0.label"),
    (("entries", 0, "label"), True, "entries.0.label"),
    (("entries", 0, "label"), "3", "entries.0.label"),
    (("entries", 0, "label"), 3.0, "entries.0.label"),
    (("entries", 0, "answer"), None, "a label came without an answer"),
    (("entries", 0, "request"), None, "a request and the number of attempts do not agree"),
    (("entries", 0, "attempts"), 0, "a request and the number of attempts do not agree"),
    (("entries", 0, "attempts"), 10**9, "entries.0.attempts"),
    (("entries", 0, "status"), 7, "entries.0.status"),
    (("entries", 0, "image"), "A" * 64, "entries.0.image"),
    (("entries", 0, "image"), "a" * 64 + "\n", "entries.0.image"),
    (("entries",), {}, "entries: Input should be a valid array"),
    (("entries", 0), [], "entries.0"),
    (("options",), [], "options"),
    (("options", "mean"), [[1]], "options.mean"),
    (("options", "x"), {"y": 1}, "options.x"),
    (("url",), None, "url"),
    (("url",), "u" * 20_000, "url"),
]


@pytest.mark.parametrize(("path", "to", "said"), CHANGES, ids=range(len(CHANGES)))
def test_a_field_that_is_wrong_is_named(
    made: Transcript, tmp_path: Path, path: tuple[Any, ...], to: Any, said: str
) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(changed(made, *path, to=to))
    with pytest.raises(SuspectError) as raised:
        Transcript.load(file)
    assert said in one_line(raised.value)
    assert "expected a transcript of type countermark/transcript/v1" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"null", "the file: Input should be an object"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"type": "countermark/transcript/v1", "type": "x"}', "'type' stands twice"),
        (b'{"type": NaN}', "NaN is no JSON number"),
        (b"{}", "type: Field required"),
    ],
)
def test_what_is_no_transcript_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(SuspectError) as raised:
        Transcript.load(file)
    assert said in one_line(raised.value)


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SuspectError, match=r"cannot be read \(No such file"):
        Transcript.load(tmp_path / "absent")
    with pytest.raises(SuspectError, match="is not a regular file"):
        Transcript.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SuspectError, match="is not a regular file"):
        Transcript.load(tmp_path / "pipe")
    monkeypatch.setattr("countermark.predictors.remote.transcript._LARGEST", 10)
    (tmp_path / "large").write_bytes(b" " * 11)
    with pytest.raises(SuspectError, match="it has more than 10 bytes; expected a transcript"):
        Transcript.load(tmp_path / "large")


def test_damage_is_an_error_of_one_line_or_none(made: Transcript, tmp_path: Path) -> None:
    drawn, file, content = random.Random(3), tmp_path / "t.json", made.to_bytes()  # noqa: S311
    for changes in range(300):
        file.write_bytes(mutated(content, drawn, 1 + changes % 5))
        try:
            Transcript.load(file)
        except SuspectError as error:
            one_line(error)
