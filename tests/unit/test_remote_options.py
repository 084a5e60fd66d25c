"""Options, urls and headers: what cannot be right is said at once, and no secret is ever shown."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import one_line

from countermark.errors import ConfigError, MissingExtraError
from countermark.predictors.remote import RemoteOptions, connect
from countermark.predictors.remote.address import complete_url, redact_url
from countermark.predictors.remote.headers import VARIABLE, read_secret_headers
from suspect_server import Seen, Suspects, some_images

pytestmark = pytest.mark.usefixtures("quick")


def test_the_defaults_are_these() -> None:
    public = RemoteOptions("mlflow").to_public_json()
    assert json.loads(json.dumps(public)) == public
    assert public == {
        "protocol": "mlflow", "model": None, "input_name": None, "datatype": None,
        "layout": "nchw", "pixels": "uint8", "mean": [], "std": [], "picture": "png",
        "jpeg_quality": 95, "answer": "auto", "answer_at": None, "class_names": [],
        "template": None, "batch": None, "budget": 1000, "rate": None, "timeout": 10.0,
        "deadline": 300.0, "retries": 3, "largest_answer": 8 << 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"protocol": "grpc"}, "option protocol is 'grpc': Input should be 'oip', 'tf_serving'"),
        ({"batch": 0}, "option batch is 0: Input should be greater than or equal to 1"),
        ({"budget": 10**9}, "option budget is 1000000000: Input should be less than or equal"),
        ({"timeout": 0}, "option timeout is 0"),
        ({"deadline": float("inf")}, "option deadline is inf"),
        ({"rate": -1}, "option rate is -1"),
        ({"retries": 1000}, "option retries is 1000"),
        ({"jpeg_quality": 101}, "option jpeg_quality is 101"),
        ({"pixels": "normalised", "mean": (0.5,), "std": (0.0,)}, "option std is (0.0,)"),
        ({"pixels": "normalised"}, "takes mean and std, one number a channel"),
        ({"pixels": "normalised", "mean": (0.5, 0.5), "std": (1.0,)}, "takes mean and std"),
        ({"mean": (0.5,)}, "mean and std are for pixels = 'normalised': leave them out"),
        ({"model": "m"}, "model is for oip and tf_serving: leave it out"),
        ({"datatype": "FP32"}, "datatype is for oip: leave it out"),
        ({"protocol": "oip", "datatype": "UINT8", "pixels": "unit"}, "whole-number datatypes"),
        ({"protocol": "image", "input_name": "x"}, "input_name is for oip, tf_serving and mlflow"),
        ({"protocol": "image", "batch": 2}, "a request carries one image: leave batch out"),
        ({"class_names": ("a", "b", "a")}, "two classes of class_names have one name"),
        ({"answer_at": "a..b"}, "answer_at is no path"),
        ({"answer_at": "*.a.*"}, "answer_at is no path"),
        ({"template": "1"}, "protocol json takes a template, the others take none"),
        ({"protocol": "json"}, "protocol json takes a template, the others take none"),
        ({"protocol": "json", "template": "{"}, "the template is no JSON text"),
        ({"protocol": "json", "template": "[" * 100_000}, "the template is no JSON text"),
        ({"protocol": "json", "template": "[$image]"}, "the template is no JSON text"),
        ({"protocol": "json", "template": '{"$images": 1}'}, "the template is no JSON text"),
        ({"protocol": "json", "template": '{"x": 1}'}, 'no "$image", "$images" or "$pixels"'),
        ({"protocol": "json", "template": '"see $images"'}, 'no "$image", "$images" or "$pixels"'),
        ({"protocol": "json", "template": '"$image"', "batch": 2}, "leave batch out"),
    ],
    ids=range(29),
)
def test_what_cannot_be_right_is_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RemoteOptions(**({"protocol": "mlflow"} | fields))
    assert said in one_line(raised.value)


ADDRESSES = [
    ("oip", "http://h:8080", "m", "http://h:8080/v2/models/m/infer"),
    ("oip", "http://h/v2/", "a/b", "http://h/v2/models/a%2Fb/infer"),
    ("oip", "http://h/v2/models", "m", "http://h/v2/models/m/infer"),
    ("oip", "https://h/gate/v2/models/m/versions/1", None,
     "https://h/gate/v2/models/m/versions/1/infer"),
    ("oip", "https://h/v2/models/m/infer?k=1#x", None, "https://h/v2/models/m/infer?k=1"),
    ("tf_serving", "http://h:8501/", "m", "http://h:8501/v1/models/m:predict"),
    ("tf_serving", "http://h/v1/models/m", None, "http://h/v1/models/m:predict"),
    ("tf_serving", "http://h/v1/models/m:predict", None, "http://h/v1/models/m:predict"),
    ("mlflow", "http://h", None, "http://h/invocations"),
    ("mlflow", "http://h/endpoints/e/invocations", None, "http://h/endpoints/e/invocations"),
    ("image", "http://[::1]:80", None, "http://[::1]:80/"),
    ("image", "http://h/classify/", None, "http://h/classify/"),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "url", "model", "expected"), ADDRESSES)
def test_a_url_is_completed(protocol: Any, url: str, model: str | None, expected: str) -> None:
    assert complete_url(url, RemoteOptions(protocol, model=model)) == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://sesame", "must begin with http:// or https://"),
        ("file:///etc/passwd", "must begin with http:// or https://"),
        ("sesame.example.com/x", "must begin with http:// or https://"),
        ("", "must begin with http:// or https://"),
        ("https://", "must begin with http:// or https:// and a host"),
        ("https:///sesame", "and a host"),
        ("https://sesame:99999", "has a host or port that cannot be read"),
        ("https://[sesame", "has a host or port that cannot be read"),
        ("https://me:sesame@h/", "holds a user's name or password: leave it out"),
        ("https://sesame@h/", "COUNTERMARK_HEADERS_FILE"),
        ("https://h/ sesame", "a space or a control character"),
        ("https://h/\r\nX: sesame", "a space or a control character"),
        ("https://h/\x00", "a space or a control character"),
        ("https://" + "ß" * 500 + "/sesame", "no connection can be made"),
        ("https://h/?token=sesame", "oip needs the name of a model"),
        ("https://h/v2/models/m?token=sesame", "the url already names a model"),
    ],
)
def test_a_url_that_cannot_be_asked_is_refused_and_not_repeated(url: str, said: str) -> None:
    model = None if "needs the name" in said else "m"
    with pytest.raises(ConfigError) as raised:
        connect(url, RemoteOptions("oip", model=model))
    assert said in one_line(raised.value)
    assert "sesame" not in str(raised.value)


def test_a_url_is_shown_without_its_query() -> None:
    assert redact_url("https://h:1/a;b?token=sesame&x#sesame") == "https://h:1/a;b"


@pytest.mark.parametrize(
    ("images", "fields", "said"),
    [
        (np.zeros((1, 3, 4, 4)), {}, "expected images as uint8 (n, C, H, W)"),
        (np.zeros((3, 4, 4), np.uint8), {}, "came uint8 (3, 4, 4)"),
        (np.zeros((1, 3, 0, 4), np.uint8), {}, "came uint8 (1, 3, 0, 4)"),
        (some_images(1, 4), {"protocol": "image"}, "a png has 1 or 3 channels, the images have 4"),
        (some_images(1, 3), {"pixels": "normalised", "mean": (0.5,), "std": (1.0,)},
         "mean and std are for 1 channel(s), the images have 3"),
        (some_images(6), {"budget": 5}, "expected at most 5 images in all, came 6 after 0"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_sent_are_refused_before_any_is(
    suspects: Suspects, images: Any, fields: dict[str, Any], said: str
) -> None:
    seen: list[Seen] = []
    url = suspects.answer(seen.append)
    asked = RemoteOptions(**({"protocol": "mlflow"} | fields))
    with connect(url, asked) as endpoint, pytest.raises(ConfigError) as raised:
        endpoint(images)
    assert said in one_line(raised.value)
    assert not seen
    assert not endpoint.transcript.entries


def test_the_budget_is_for_all_calls_together(suspects: Suspects) -> None:
    url = suspects.answer(lambda seen: {"predictions": [1] * len(seen.json["inputs"])})
    with connect(url, RemoteOptions("mlflow", budget=5)) as endpoint:
        endpoint(some_images(3))
        with pytest.raises(ConfigError, match="at most 5 images in all, came 3 after 3"):
            endpoint(some_images(3))
        assert endpoint(some_images(2)).tolist() == [1, 1]


def headers_file(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    path = folder / "headers"
    path.write_bytes(content)
    monkeypatch.setenv(VARIABLE, str(path))


def test_headers_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_secret_headers() == {}
    content = b"# for the suspect\r\nAuthorization:  Bearer a b=\r\n\r\nx-key:\tv\nUser-Agent: me\n"
    headers_file(tmp_path, monkeypatch, content)
    found = {"authorization": "Bearer a b=", "x-key": "v", "user-agent": "me"}
    assert read_secret_headers() == found


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"sesame", 1),
        (b"a: 1\nsesame", 2),
        (b"a: 1\nA: sesame", 2),
        (b"\nsesame :1", 2),
        (b"a:", 1),
        (b"a: sesame\x00", 1),
        ("a: sesäme".encode(), 1),
        (b"Host: sesame", 1),
        (b"content-length: 5", 1),
        (b"Accept-Encoding: gzip", 1),
    ],
)
def test_a_line_that_is_no_header_is_named_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, line: int
) -> None:
    headers_file(tmp_path, monkeypatch, content)
    with pytest.raises(ConfigError) as raised:
        connect("http://127.0.0.1", RemoteOptions("mlflow"))
    said = one_line(raised.value)
    assert said.startswith(f"line {line} of the file in COUNTERMARK_HEADERS_FILE: expected")
    assert "ses" not in said


def test_a_headers_file_that_cannot_be_read_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("Authorization: Bearer sesame", str(tmp_path)):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(ConfigError, match=r"the file that .* names cannot be read") as raised:
            read_secret_headers()
        assert value not in one_line(raised.value)
    headers_file(tmp_path, monkeypatch, b"a: " + b"x" * (1 << 16))
    with pytest.raises(ConfigError, match="more than 65,536 bytes"):
        read_secret_headers()


def test_secrets_are_sent_and_nowhere_shown(
    suspects: Suspects,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    headers_file(tmp_path, monkeypatch, b"Authorization: Bearer sesame-1\n")
    seen: list[Seen] = []
    url = suspects.answer(lambda each: seen.append(each) or 3)
    asked = RemoteOptions("json", template='{"key": "sesame-2", "x": "$image"}')
    with connect(f"{url}?token=sesame-3", asked) as endpoint:
        assert endpoint(some_images(1)).tolist() == [3]
        with pytest.raises(ConfigError) as raised:
            endpoint(some_images(5000))
    (request,) = seen
    assert request.headers["authorization"] == "Bearer sesame-1"
    assert request.json["key"] == "sesame-2"
    assert request.query == "token=sesame-3"
    transcript = endpoint.transcript
    said = [repr(each) for each in (endpoint, asked, transcript, vars(endpoint), raised.value)]
    said += [str(endpoint), transcript.to_bytes().decode(), caplog.text, *capfd.readouterr()]
    assert "sesame" not in "".join(said)
    assert url in transcript.url


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, protocol in (("PIL.Image", "image"), ("httpx2", "mlflow")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, missing, None)
            with pytest.raises(MissingExtraError) as raised:
                connect("http://127.0.0.1", RemoteOptions(protocol))
        assert "pip install 'countermark[remote]'" in one_line(raised.value)
