"""The secret of a key shows nowhere: not in reprs, errors, verdicts or key.json."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from keys import known_key, one_line
from opened import images_of

from countermark.errors import CountermarkError
from countermark.keys.key import Key, KeyMaterial, digest_tensor
from countermark.results.verdict import VerificationOptions
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.uchida.scheme import Uchida
from countermark.verification.disclosure import disclose_triggers
from countermark.verification.verify import examine


def traces(secret: bytes) -> list[bytes]:
    encoded = [base64.b64encode(secret), base64.urlsafe_b64encode(secret), base64.b32encode(secret)]
    texts = [secret.hex(), secret.hex().upper(), repr(secret), ", ".join(map(str, secret))]
    whole = [*encoded, *(text.encode() for text in texts), secret, secret[::-1]]
    return [*whole, secret[:8], secret[:8].hex().encode(), base64.b64encode(secret[:9])]


def test_key_json_and_an_encrypted_folder_hold_no_secret(tmp_path: Path) -> None:
    key = replace(known_key(), material=KeyMaterial.generate())
    key.save(tmp_path / "plain.key")
    key.save(tmp_path / "sealed.key", "correct horse")
    plain, sealed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("plain.key", "sealed.key")
    )
    for trace in traces(key.material.secret):
        assert trace not in plain["key.json"]
        assert trace not in sealed["key.json"]
        assert trace not in sealed["key.safetensors"]
    assert key.material.secret in plain["key.safetensors"]


def test_no_repr_verdict_or_error_tells_the_secret(tmp_path: Path) -> None:
    model, material = torch.nn.Linear(32, 16), KeyMaterial.generate()
    embedding = Uchida(layer="weight", bits=128).embed(model, owner="ACME", material=material)
    key = embedding.drawn_key
    assert key is not None
    verdict = examine(model, key, VerificationOptions())
    said = [repr(each) for each in (key, material, embedding, [key], {"key": key}, verdict)]
    said += [str(key), f"{material}", verdict.explain(), json.dumps(verdict.to_json())]
    said += [repr(key.make_stream("rows")), repr(replace(key, owner="x"))]
    key.save(tmp_path / "a.key", "correct horse")
    (tmp_path / "b.key").mkdir()
    for act in (
        lambda: embedding.key,
        lambda: Key.load(tmp_path / "a.key"),
        lambda: Key.load(tmp_path / "a.key", "wrong"),
        lambda: key.save(tmp_path / "b.key"),
        lambda: examine(model, replace(key, scheme="none"), VerificationOptions()),
        lambda: examine(model, key, VerificationOptions(), null="none"),
    ):
        with pytest.raises(CountermarkError) as caught:
            act()
        said += [repr(caught.value), one_line(caught.value)]
    for trace in traces(material.secret):
        assert not any(trace in text.encode() for text in said)
    for trace in traces(material.nonce):
        assert not any(trace in text.encode() for text in said)


@pytest.mark.real_secrets
def test_fresh_material_is_drawn_from_the_system_and_never_repeats() -> None:
    drawn = [KeyMaterial.generate() for _ in range(100)]
    assert len({each.secret for each in drawn} | {each.nonce for each in drawn}) == 200
    assert {(len(each.secret), len(each.nonce)) for each in drawn} == {(32, 16)}
    assert not any(each.test_key for each in drawn)
    assert (
        KeyMaterial.from_test_seed(1)
        == KeyMaterial.from_test_seed(1)
        != KeyMaterial.from_test_seed(2)
    )
    assert KeyMaterial.from_test_seed(1).test_key


def test_an_opening_holds_neither_the_secret_nor_what_was_not_opened() -> None:
    material = KeyMaterial.generate()
    made = Adi(10, 40).generate_key(
        {"triggers": images_of(40)}, owner="ACME Inc.", material=material
    )
    opened = disclose_triggers(made, [0, 3, 7])
    said = opened.to_bytes() + repr(opened).encode() + repr(opened.check()).encode()
    secrets = [
        material.secret,
        *(s for n, s in enumerate(material.draw_salts(40)) if n not in (0, 3, 7)),
    ]
    for secret in secrets:
        assert not any(trace in said for trace in traces(secret))
    for index, image in enumerate(images_of(40)):
        written = base64.b64encode(image.tobytes())
        assert (written in said) == (index in (0, 3, 7))
        assert image.tobytes() not in said
        assert image.tobytes().hex().encode() not in said
        digest = digest_tensor("trigger", image)
        assert digest not in said
        assert digest.hex().encode() not in said
