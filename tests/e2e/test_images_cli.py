"""Networks that make images, from the command line: embed, mark, verify a folder, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_calls import call, listing

import barriers
from countermark.images.image_files import encode_png
from countermark.training import embed_image_model as making

TINY = ["task=denoise", "sizes=tiny", "side=32", "bits=100", "steps=2", "batch=4"]


def embedding(folder: Path, *more: str, settings: list[str] = TINY) -> list[str | Path]:
    """The arguments of a network that is trained for a moment, and a barrier that will not take."""
    fields = [word for each in settings for word in ("--set", each)]
    return [
        "embed", "--scheme", "deep_watermarking", "--data", "drawn", *fields, "--epochs", "1",
        "--owner", "ACME Inc.", "--out", folder / "net.safetensors", "--key", folder / "a.key",
        *more,
    ]  # fmt: skip


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with a key, and images that bear no mark."""
    barriers.key().save(tmp_path / "acme.key")
    (tmp_path / "outputs").mkdir()
    for number, image in enumerate(barriers.images()):
        (tmp_path / "outputs" / f"{number}.png").write_bytes(encode_png(image))
    (tmp_path / "outputs" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_marked_images_are_owned_and_others_are_not(published: Path) -> None:
    key, out = published / "acme.key", published / "marked"
    said = call("mark-images", published / "outputs", "--key", key, "--out", out, "--json")
    assert (said.code, said.json["images"]) == (0, len(barriers.images())), said
    assert said.json["skipped"]["first"] == ["broken.png"]
    assert call("verify", out, "--key", key).code == 3  # whoever chose them may have known
    judged = ["verify", out, "--key", key, "--blind-choice", "--json"]
    said = call(*judged, "--resume", published / "state.json")
    assert (said.code, said.json["outcome"]) == (0, "owned"), said
    said = call("verify", published / "outputs", "--key", key)
    assert said.code == 1
    assert "1 skipped (1 no picture that can be read)" in said.out
    assert not (published / "state.json").exists()


def test_a_report_on_images_says_which_were_read_and_comes_to_the_same(published: Path) -> None:
    where = ["--out", published / "report.html", "--bundle", published / "bundle"]
    judged = [published / "outputs", "--key", published / "acme.key"]
    assert call("report", *judged, *where).code == 1
    page = (published / "report.html").read_text()
    digest = call("verify", *judged, "--json").json["suspect"]["sha256"]
    for part in (
        f"<th>images that were read</th><td>{len(barriers.images())}; skipped, no picture that can",
        f"<th>SHA-256 of the images</th><td><code>{digest}</code>",
    ):
        assert part in page, part
    again = call("report", *judged, "--replay", published / "bundle")
    assert again.code == 1
    assert "it is the same" in again.out


def test_what_cannot_be_is_one_line(published: Path) -> None:
    key, outputs = published / "acme.key", published / "outputs"
    for arguments, says in (
        (["verify", "http://127.0.0.1/", "--key", key], "expected a folder of images"),
        (["verify", outputs / "0.png", "--key", key], "is no folder"),
        (["verify", outputs, "--key", key, "--null", "fresh_keys"], "has no null"),
        (["mark-images", outputs, "--key", key, "--out", outputs], "write to another folder"),
        (embedding(published, settings=TINY[1:]), "Give --set task=derain"),
        (embedding(published, settings=[*TINY, "bits=99"]), "each name once"),
        (embedding(published, "--model", "mlp"), "does not take images"),
        (embedding(published, "--teacher", "x.safetensors"), "--teacher is for classifiers"),
        (["embed", "--scheme", "none", "--data", "digits", "--out", "x"], "Give --model"),
    ):
        said = call(*arguments)
        assert said.code == 2, said
        assert says in said.why
    assert not list(published.glob("net.safetensors*"))


def test_an_interrupted_run_goes_on_and_one_that_ends_badly_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(making, "OutputEmbedding", interrupt)
        said = call(*embedding(tmp_path))
    assert "interrupted" in said.why
    assert "net.safetensors.resume holds the secret until then" in said.notes[0]
    resume = tmp_path / "net.safetensors.resume"
    assert {"order.json", "material", "network.pt"} <= set(listing(resume))
    secret = (resume / "material").read_bytes()
    assert "belongs to an interrupted run" in call(*embedding(tmp_path, "--seed", "7")).why
    with monkeypatch.context() as patched:
        patched.setattr(
            making, "_train_network", lambda network, *_: network
        )  # it is there already
        patched.setattr(making, "OutputEmbedding", interrupt)
        call(*embedding(tmp_path))
    assert (resume / "material").read_bytes() == secret
    said = call(*embedding(tmp_path))
    assert (said.code, "of 100 bits are read from marked images" in said.why) == (2, True)
    assert listing(tmp_path) == {}
