"""A model server that others wrote: MLServer, in an environment of its own, asked as a suspect."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from countermark.predictors.remote import RemoteOptions, connect

PATIENCE = 600  # seconds to install, 120 to start

MODEL = '''
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, NumpyRequestCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Suspect(MLModel):
    """Labels, or scores with their largest at the label: the sum of the image modulo 10."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        labels = images.reshape(len(images), -1).astype(np.int64).sum(axis=1) % 10
        outputs = {"label": labels, "scores": np.eye(10, dtype=np.float32)[labels] * 0.5}
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, each) for name, each in outputs.items()],
        )
'''


def installed(folder: Path) -> Path:
    """The `mlserver` program of a new environment; skips where it cannot be installed."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=PATIENCE)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "mlserver"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        pytest.skip(f"mlserver cannot be installed here: {last}")
    return folder / "bin" / "mlserver"


def configured(folder: Path) -> int:
    """The port of a server that is configured in `folder`, with one model in it."""
    here = ("127.0.0.1", 0)
    with socket.create_server(here) as one, socket.create_server(here) as two:
        http, grpc = (each.getsockname()[1] for each in (one, two))
    settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "parallel_workers": 0,
                "metrics_endpoint": None, "use_structured_logging": False}  # fmt: skip
    files = {
        "model.py": MODEL,
        "settings.json": json.dumps(settings),
        "model-settings.json": json.dumps({"name": "suspect", "implementation": "model.Suspect"}),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    return int(http)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v2/models/suspect/ready", timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"mlserver did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a running MLServer."""
    folder = tmp_path_factory.mktemp("mlserver")
    program, port = installed(folder / "venv"), configured(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, "start", "."], cwd=folder, env=environment, stdout=file, stderr=file
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(folder / "venv")  # hundreds of megabytes, which pytest would keep


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("output", "answer"), [("label", "auto"), ("scores", "scores")])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_mlserver_is_asked_and_its_transcript_replays(
    mlserver: str, output: str, answer: str, datatype: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 8, 8), dtype=np.uint8)
    asked = RemoteOptions(
        "oip", model="suspect", datatype=datatype, answer_at=output, answer=answer
    )
    with connect(mlserver, asked) as endpoint:
        labels = endpoint(images)
    assert labels.tolist() == [int(image.sum()) % 10 for image in images]
    assert endpoint.transcript.make_replay()(images).tolist() == labels.tolist()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_mlserver_refuses_is_said(mlserver: str) -> None:
    images = np.zeros((1, 1, 2, 2), dtype=np.uint8)
    said = []
    for model, output in (("absent", "label"), ("suspect", None), ("suspect", "absent")):
        with connect(mlserver, RemoteOptions("oip", model=model, answer_at=output)) as endpoint:
            assert endpoint(images).tolist() == [-1]
        said += [entry.why for entry in endpoint.transcript.entries]
    assert said == [
        "answered 404",
        "2 named outputs came: say which is meant with answer_at",
        "there is no output 'absent' among 2",
    ]
