"""DeepStego from the command line: mark, verify a file and a service, replay, resume."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import call, embed, listing, refused
from killing import Driver
from PIL import Image
from safetensors.torch import load_file

from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.predictors.base import make_module_predictor
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.triggers import FreshTriggers
from countermark.training.data import load_data
from countermark.training.models import build
from countermark.verification.verify import verify

pytestmark = pytest.mark.xdist_group("deepstego")  # its models are made once

QUICK = ["stego_steps=60", "foreign=0", "pool=512"]


def stego(**changed: Any) -> list[str]:
    """The arguments of a quick mark in answers; none of its images could pass for a cover."""
    usual = {"scheme": "deepstego", "layer": None, "bits": None, "epochs": "8", "set": QUICK}
    return embed(**(usual | changed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a marked and an unmarked network, and the key."""
    folder = tmp_path_factory.mktemp("deepstego")
    said = call(*stego(out=folder / "marked.safetensors", key=folder / "acme.key", json=""))
    assert said.code == 0, said
    assert (said.json["unit"], said.json["bits"]) == ("triggers", 100)
    other = {"scheme": "none", "key": None, "owner": None, "set": None, "seed": "5"}
    assert call(*stego(out=folder / "other.safetensors", **other)).code == 0
    return folder


def verified(made: Path, suspect: Any, *more: str, code: int) -> Any:
    said = call("verify", suspect, "--key", made / "acme.key", "--json", *more)
    assert said.code == code, said
    return said.json


def test_the_mark_is_found_in_its_file_without_a_date(made: Path) -> None:
    verdict = verified(made, made / "marked.safetensors", code=0)
    assert (verdict["outcome"], verdict["null"]) == ("owned", "secret_labels")
    assert verdict["unit"] == "triggers"
    assert verdict["forgery_bits"] > 80
    assert verdict["suspect"]["model"] == "mlp"
    assert len(verdict["suspect"]["file_sha256"]) == 64


def test_an_unmarked_file_is_not_accused(made: Path) -> None:
    assert verified(made, made / "other.safetensors", code=1)["outcome"] == "not_proven"


def test_the_key_holds_the_stego_network_and_opens_after_a_passphrase(made: Path) -> None:
    key = Key.load(made / "acme.key")
    assert key.frozen["triggers"].shape == (100, 1, 28, 28)
    assert any(name.startswith("stego.") for name in key.frozen)
    assert key.c1 is None
    assert "frozen" not in repr(key)


# --- a service


@dataclass
class Service:
    """A prediction service over one of the networks, and how often it was asked."""

    model: Path
    images: int = 0
    answers: list[int] = field(default_factory=list)

    def classify(self, images: Any) -> list[int]:
        network = build("mlp", {})
        network.load_state_dict(load_file(self.model))
        key = Key.load(self.model.parent / "acme.key")
        predict = make_module_predictor(network, key.fields["mean"], key.fields["deviation"])
        self.images += len(images)
        return predict(np.asarray(images, dtype=np.uint8)).tolist()


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The service on loopback: MLflow's protocol, and pictures in a JSON of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/invocations":
                said: Any = {"predictions": service.classify(body["inputs"])}
            else:
                pictures = [Image.open(io.BytesIO(base64.b64decode(e))) for e in body["pictures"]]
                found = service.classify([np.asarray(each)[None] for each in pictures])
                said = [{"label": f"digit {each}", "score": 0.9} for each in found]
            content = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_service_is_judged_as_its_file_is(made: Path, tmp_path: Path) -> None:
    for name, code in (("marked", 0), ("other", 1)):
        service = Service(made / f"{name}.safetensors")
        record = tmp_path / f"{name}.json"
        with serving(service) as url:
            asked = ["--ask", "protocol=mlflow", "--transcript", str(record)]
            verdict = verified(made, url, *asked, code=code)
        assert service.images == 100
        assert verdict["matched"] == verified(made, service.model, code=code)["matched"]
        again = verified(made, record, "--recorded", code=code)
        assert again["suspect"].pop("recorded")
        assert "nobody was asked" in again["limits"].pop(-1)
        assert again == verdict  # to the last digit


def test_a_report_on_a_service_names_its_answers_and_needs_no_service_to_be_repeated(
    made: Path, tmp_path: Path
) -> None:
    record, page, bundle = (tmp_path / each for each in ("t.json", "r.html", "bundle"))
    key = ["--key", made / "acme.key"]
    with serving(Service(made / "marked.safetensors")) as url:
        asked = ["--ask", "protocol=mlflow", "--transcript", record, "--out", page]
        assert call("report", url, *key, *asked, "--bundle", bundle).code == 0
    about = json.loads((bundle / "record.json").read_bytes())["subject"]
    assert about["transcript_sha256"] in page.read_text()
    assert call("report", "--replay", bundle).code == 3
    replayed = ["report", *key, "--replay", bundle]
    again = call(*replayed, record, "--recorded")
    assert "it is the same" in again.out, again
    assert "nobody was asked" in again.out
    other = call(*replayed, made / "other.safetensors")
    assert (other.code, "it is another suspect" in other.why) == (2, True)


def test_pictures_and_names_of_classes(made: Path, tmp_path: Path) -> None:
    template = tmp_path / "body.json"
    template.write_text('{"pictures": "$images"}')
    names = json.dumps([f"digit {each}" for each in range(10)])
    options = ["protocol=json", f"template=@{template}", f"class_names={names}"]
    with serving(Service(made / "marked.safetensors")) as url:
        asked = [word for each in options for word in ("--ask", each)]
        assert verified(made, f"{url}/classify", *asked, code=0)["answered"] == 100


def test_a_service_that_is_not_there_gives_no_verdict(made: Path, tmp_path: Path) -> None:
    asked = ["--ask", "protocol=mlflow", "--ask", "retries=0"]
    record = tmp_path / "nobody.json"
    verdict = verified(made, "http://127.0.0.1:9", *asked, "--transcript", str(record), code=3)
    assert "no answer that could be read" in verdict["reason"]
    assert record.exists()  # who did not answer is evidence too


@pytest.mark.parametrize(
    ("suspect", "more", "says"),
    [
        ("http://127.0.0.1:9", [], "Give --ask protocol=oip"),
        ("http://127.0.0.1:9", ["--ask", "protocoll=oip"], "the nearest is 'protocol'"),
        ("http://127.0.0.1:9", ["--ask", "protocol=soap"], "remote option protocol is 'soap'"),
        ("marked.safetensors", ["--ask", "protocol=oip"], "are for a service: expected a URL"),
        ("marked.safetensors", ["--model", "vgg16"], "does not fit the model"),
        ("nowhere.safetensors", [], "nowhere.safetensors"),
        ("marked.safetensors", ["--recorded"], "marked.safetensors"),
        ("marked.safetensors", ["--fresh", "digits", "--fresh-images", "0"], "is 0: expected"),
        ("marked.safetensors", ["--fresh", "nowhere"], "nowhere"),
        (
            "marked.safetensors",
            ["--fresh", "digits", "--null", "secret_labels"],
            "expected secret_class_map",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    made: Path, monkeypatch: pytest.MonkeyPatch, suspect: str, more: list[str], says: str
) -> None:
    monkeypatch.chdir(made)
    refused(["verify", suspect, "--key", "acme.key", *more], says, made)


def test_a_key_that_reads_weights_asks_nobody(here: Path) -> None:
    assert call(*embed()).code == 0
    refused(
        ["verify", "http://127.0.0.1:9", "--key", "new.key", "--ask", "protocol=oip"],
        "a key of uchida reads weights: expected a weight file",
        here,
    )


def test_code_that_a_key_names_is_not_run(made: Path, tmp_path: Path) -> None:
    key = Key.load(made / "acme.key").with_model("os:getcwd", {})
    key.save(tmp_path / "strange.key")
    said = call("verify", made / "marked.safetensors", "--key", tmp_path / "strange.key")
    assert said.code == 2
    assert "if you trust it, repeat it as --model" in said.why


def test_a_killed_run_ends_as_an_undisturbed_one(here: Path, driver: Driver) -> None:
    quick = stego(epochs="4", test_key="3", set=["stego_steps=30", "foreign=0", "pool=128"])
    driver.killed("after(train.Checkpoint, 'save', 1)", quick, here)
    assert call(*quick).code == 0
    resumed = listing(here)
    for path in sorted(here.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert call(*quick).code == 0
    assert listing(here) == resumed


def test_the_committed_images_are_what_the_host_learns(made: Path) -> None:
    network = build("mlp", {})
    network.load_state_dict(load_file(made / "marked.safetensors"))
    key = Key.load(made / "acme.key")
    with torch.no_grad():
        images = torch.from_numpy(key.frozen["triggers"]).float()
        scores = network((images - key.fields["mean"][0]) / key.fields["deviation"][0])
    expected = torch.from_numpy(key.draw_labels(100, 10))
    assert (scores.argmax(dim=1) == expected).float().mean() > 0.5


@pytest.mark.parametrize("suspect", ["marked", "other"])
def test_fresh_triggers_are_judged_by_the_rank_of_the_class_map(made: Path, suspect: str) -> None:
    asked = ["--fresh", "digits", "--fresh-images", "150", "--alpha", "1e-3", "--assume-dated",
             "--blind-choice"]  # fmt: skip
    said = call(
        "verify", made / f"{suspect}.safetensors", "--key", made / "acme.key", "--json", *asked
    )
    verdict = said.json
    assert (verdict["null"], verdict["bits"]) == ("secret_class_map", 150)
    assert verdict["floor"] == pytest.approx(-5.56, abs=0.01)
    assert verdict["forgery_bits"] == 0, "whoever likes can try all maps"
    assert said.code == (0 if verdict["log10_p"] <= -3 else 1)
    assert suspect == "marked" or said.code == 1


def test_a_host_that_follows_the_map_is_found_and_needs_a_date(made: Path) -> None:
    key, data = Key.load(made / "acme.key"), load_data("digits")
    covers, classes = data.test_images[:60].numpy(), data.test_labels[:60].numpy()
    scheme = load_scheme(key)
    assert isinstance(scheme, DeepStego)
    mapped = scheme.draw_class_map(key)[classes]
    fresh = FreshTriggers(key, covers, classes)
    undated = verify(lambda images: mapped[: len(images)], fresh, alpha=1e-5, blind_choice=True)
    assert undated.outcome == "no_verdict"
    assert "dated claim" in undated.reason
    dated = verify(lambda images: mapped[: len(images)], fresh, alpha=1e-5, assume_dated=True)
    assert dated.outcome == "no_verdict"
    assert "covers can be chosen, or given classes" in dated.reason
    dated = verify(
        lambda images: mapped[: len(images)], fresh, alpha=1e-5, assume_dated=True,
        blind_choice=True,
    )  # fmt: skip
    assert dated.outcome == "owned"
    assert dated.log10_p == pytest.approx(dated.floor)
    with pytest.raises(ConfigError, match="a class for each cover, 0 to 9"):
        verify(lambda images: mapped[: len(images)], FreshTriggers(key, covers, classes + 1))
