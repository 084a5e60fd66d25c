"""Every reader of files, given damaged ones: one of our errors, or an answer that may be believed.

Where a file has a checksum, a signature or a commitment, that is the answer that it had before.
Where it has none, the damaged file may be another valid one: then all that is read of it is finite,
of the shape that the reader says, and no more than the file can hold.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzzing import MUTATIONS, with_checksums
from keys import InMemory, known_key, one_line
from onnx import helper, numpy_helper
from opened import images_of
from opened import key as trigger_key
from torch import nn

from authority import LocalAuthority, some_claim
from checkpoints import sharded
from coded_forms import FORMS
from countermark.checkpoints import (
    compute_model_digest,
    load_state,
    open_suspect,
)
from countermark.claims.growth import ConsistencyProof
from countermark.claims.signed import Claim, TreeHead, load_signed_document
from countermark.claims.signing import compute_key_id, load_public_key, write_key_pair
from countermark.claims.timestamp import Authority, find_confirmed_timestamps
from countermark.errors import CountermarkError
from countermark.images.image_files import MAX_PIXELS
from countermark.images.image_folder import ImageFolder
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.remote import Transcript
from countermark.predictors.remote.images import digest_image
from countermark.predictors.remote.transcript import TranscriptEntry
from countermark.report.bundle import make_bundle_files, replay_bundle, save_bundle
from countermark.report.record import make_record
from countermark.results.verdict import VerificationOptions
from countermark.schemes.logo import read_logo
from countermark.schemes.uchida.scheme import Uchida
from countermark.verification.disclosure import TriggerDisclosure, disclose_triggers
from countermark.verification.verify import examine
from gguf_files import write_gguf

FEW, MANY = 120, 10_000  # mutations of every reader
MEMORY = 1 << 30  # bytes of address space that reading a damaged file may take beside what there is
PICKLE_MEMORY = 256 << 20  # the same for files of torch, which are small here
LARGEST_ANSWER = 64  # values that are read for each byte of a file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        build: write a valid file, or folder, into a folder, by a number; returns its path.
        read: read of it what a verdict would read.
        is_bound: what is read is bound by checksum, signature or commitment.
        mend: make what was damaged consistent again, so that the damage is not seen at once.
        most: how many values may be read of one file; None for `LARGEST_ANSWER` a byte.
        share: of the usual number of mutations in the quick run, where reading is slow.
        memory: bytes of address space that reading a damaged file may take.
    """

    build: Callable[[Path, int], Path]
    read: Callable[[Path], Any]
    is_bound: bool = False
    mend: Callable[[Path], None] | None = None
    most: int | None = None
    share: float = 1.0
    memory: int = MEMORY


# --- weights


def state(seed: int) -> dict[str, torch.Tensor]:
    """Some tensors of several dtypes and layouts."""
    made = torch.Generator().manual_seed(seed)
    first = torch.randn(6, 8, generator=made)
    return {
        "front.weight": first, "front.turned": first.T, "back.half": first.bfloat16(),
        "back.weight": first.double()[:3, :2].clone(), "steps": torch.tensor(seed),
        "back.bias": torch.randn(8, generator=made).half(),
    }  # fmt: skip


def codes(seed: int) -> dict[str, torch.Tensor]:
    """Tensors that are stored as codes with scales."""
    made = torch.Generator().manual_seed(seed)
    whole = torch.randint(-127, 127, (4, 8), generator=made, dtype=torch.int8)
    scales = torch.rand(4, 1, generator=made)
    return {
        "a.weight": whole, "a.weight_scale": scales, "b.weight": whole, "b.SCB": scales[:, 0],
        "c._data": whole, "c._scale": scales[:1, 0],
        "d_packed": whole.view(torch.int32), "d_scale": scales, "d_shape": torch.tensor([4, 8]),
    }  # fmt: skip


def build_safetensors(folder: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    made = {name: each.contiguous().clone() for name, each in state(seed).items()}
    save_file(made, folder / "m.safetensors")
    return folder / "m.safetensors"


def build_codes(folder: Path, seed: int) -> Path:
    """Tensors of many forms of codes, and a configuration that says things about them."""
    from safetensors.torch import save_file

    weight = np.random.default_rng(seed).normal(0, 0.05, (32, 64))
    made, config = codes(seed), dict[str, Any]()
    for number, (form, encode) in enumerate(FORMS.items()):
        if form not in ("mlx 6", "fp8 by stated block"):  # groups of 128, another configuration
            coded = encode(weight, f"layer{number}.weight")
            made, config = made | coded.state, config | coded.config
    model = folder / "model"
    model.mkdir()
    save_file({n: each.contiguous().clone() for n, each in made.items()}, model / "m.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    return model


def build_sharded(folder: Path, seed: int) -> Path:
    del seed
    sharded(folder / "model")
    return folder / "model"


def build_torch(folder: Path, seed: int) -> Path:
    torch.save(state(seed), folder / "m.pt")
    return folder / "m.pt"


def build_legacy_torch(folder: Path, seed: int) -> Path:
    torch.save(state(seed), folder / "m.pt", _use_new_zipfile_serialization=False)
    return folder / "m.pt"


class Trap:
    """Makes a folder where its pickle is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.place),)


def build_training(folder: Path, seed: int, *, zipped: bool = True) -> Path:
    """A training checkpoint with a module, an optimizer, settings and a trap."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).state_dict()
    content = {
        "net": state(seed), "module": net, "optimizer": optimizer, "best": np.float64(seed),
        "settings": argparse.Namespace(out=Path("x"), seen={1, 2}), "trap": Trap(folder / "ran"),
        "pruned": {"w_orig": torch.ones(2, 3), "w_mask": torch.eye(3)[:2]},
        "normed": {"w_g": torch.ones(2, 1), "w_v": torch.ones(2, 3)},
    }  # fmt: skip
    torch.save(
        content,
        folder / "m.pt",
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=2 + 2 * seed % 4,
    )
    return folder / "m.pt"


def build_distributed(folder: Path, seed: int) -> Path:
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process saves
        made = {name: each.contiguous() for name, each in state(seed).items()}
        checkpoint.save({"model": made, "step": seed}, checkpoint_id=folder / "model")
    return folder / "model"


def build_program(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    made = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 4),))
    torch.export.save(made, folder / "m.pt2")
    return folder / "m.pt2"


def build_torch_shards(folder: Path, seed: int) -> Path:
    (folder / "model").mkdir()
    home = {name: f"m-{at % 2}.bin" for at, name in enumerate(state(seed))}
    for file in set(home.values()):
        part = {n: each for n, each in state(seed).items() if home[n] == file}
        torch.save(part, folder / "model" / file)
    index = folder / "model" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    return folder / "model"


def read_trapped(path: Path) -> dict[str, Any]:
    try:
        return read_weights(path)
    finally:
        assert not (path.parent / "ran").exists()


class Scripted(nn.Module):
    """Layers in layers, a buffer, a narrow dtype."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.front = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        self.narrow = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.front(x) + self.turned.sum() + self.narrow.float().sum()


def build_script(folder: Path, seed: int, *, frozen: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is called deprecated
        made = torch.jit.script(Scripted(seed).eval())
        torch.jit.save(torch.jit.freeze(made) if frozen else made, folder / "m.pt")
    return folder / "m.pt"


def build_onnx(folder: Path, seed: int) -> Path:
    drawn = np.random.default_rng(seed)
    weight = drawn.normal(size=(4, 6)).astype(np.float32)
    whole = drawn.integers(-127, 127, (4, 6)).astype(np.int8)
    stored = [
        numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[0], "up.bias"),
        numpy_helper.from_array(whole, "q"), numpy_helper.from_array(np.float32(0.1), "q_scale"),
        numpy_helper.from_array(np.int8(3), "q_zero"),
        helper.make_tensor("listed", onnx.TensorProto.FLOAT, (2,), [1.0, 2.0]),
    ]  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["dq"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["y", "up.bias"], ["z"]),
        helper.make_node("MatMul", ["x", "dq"], ["v"], name="side"),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight, "inner")),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], stored))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def build_external_onnx(folder: Path, seed: int) -> Path:
    path = build_onnx(folder, seed)
    model = onnx.load(path)
    onnx.save(
        model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    return folder


def build_gguf(folder: Path, seed: int) -> Path:
    """Tensors of several types, one of them stacked, and rows of queries as pairs."""
    drawn = np.random.default_rng(seed)
    names = ["blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "output.weight"]
    shapes = [(8, 32), (2, 4, 32), (3, 32)]
    tensors = {
        name: drawn.normal(size=shape).astype(np.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    form = ("Q4_0", "Q8_0", "Q5_1", "MXFP4")[seed]
    return write_gguf(
        folder / "m.gguf", tensors | {"output_norm.weight": np.ones(8, np.float32)}, form=form,
        numbers={"llama.attention.head_count": 2, "general.alignment": 32},
    )  # fmt: skip


def build_blobs(folder: Path, seed: int) -> Path:
    """A folder of Ollama models with one model in it."""
    content = build_gguf(folder, seed).read_bytes()
    (folder / "m.gguf").unlink()
    digest = hashlib.sha256(content).hexdigest()
    blob, manifest = folder / "blobs" / f"sha256-{digest}", folder / "manifests" / "m"
    for path in (blob, manifest):
        path.parent.mkdir()
    blob.write_bytes(content)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    return folder


def read_weights(path: Path) -> dict[str, Any]:
    """All tensors, whole and in part, their digests, and those that a model would be built of."""
    with open_suspect(path) as weights:
        found: dict[str, Any] = {}
        refusals: list[CountermarkError] = []
        for name, info in weights.tensors.items():
            try:
                values = weights.read(name)
                assert values.shape == info.shape
                found[name] = values
                if values.size > 1:
                    part = weights.read_part(name, 1, values.size - 1)
                    assert np.array_equal(part, values.reshape(-1)[1:])
            except CountermarkError as error:
                refusals.append(error)
        for act in (
            lambda: compute_model_digest(weights), weights.compute_file_digest, lambda: load_state(path)
        ):  # fmt: skip
            try:
                act()
            except CountermarkError as error:
                refusals.append(error)
    for each in refusals:
        one_line(each)
    if refusals and not found:
        raise refusals[0]
    return found


def mend_zip(path: Path) -> None:
    path.write_bytes(with_checksums(path.read_bytes()))


# --- keys and what was opened of them


def build_key(folder: Path, seed: int) -> Path:
    material = KeyMaterial.from_test_seed(seed)
    mask = {"mask.fc.weight": np.arange(512) % 2}
    scheme = Uchida(layer="fc.weight", bits=128)
    key = scheme.generate_key({"fc.weight": (16, 32)}, owner="A", material=material, frozen=mask)
    replace(key, learnt={"x": np.arange(3.0)}).save(folder / "a.key")
    return folder / "a.key"


def read_key(path: Path) -> Any:
    key = Key.load(path)
    tensors = {**key.frozen, **key.learnt}
    return key.commitment, key.material, {n: each.tolist() for n, each in tensors.items()}


def mend_key(path: Path) -> None:
    """The digest of the tensors in the header."""
    try:
        header = json.loads((path / "key.json").read_bytes())
        content = (path / "key.safetensors").read_bytes()
        header["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        (path / "key.json").write_text(json.dumps(header))
    except (ValueError, TypeError):  # no header any more
        return


def build_openings(folder: Path, seed: int) -> Path:
    disclose_triggers(trigger_key(seed), [7, 0, 3]).save(folder / "opened.json")
    return folder / "opened.json"


def read_openings(path: Path) -> Any:
    opened = TriggerDisclosure.load(path)
    known = [trigger_key(seed).commitment for seed in (1, 2)]
    which = opened.commitment if opened.commitment in known else known[0]
    shown = [(each.index, each.image.tobytes(), each.label) for each in opened.check(which)]
    answers = opened.extract(lambda images: np.zeros(len(images), dtype=np.int64))
    return opened.commitment, opened.owner, shown, answers.match_count


# --- claims, heads, time stamps, bundles

SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@functools.cache
def stamped_claims(authority: LocalAuthority) -> list[Claim]:
    return [authority.stamp(some_claim(SIGNER, commitment=f"{n:02x}" * 32)) for n in (1, 2)]


AUTHORITY: list[LocalAuthority] = []


@pytest.fixture(autouse=True)
def _authority(authority: LocalAuthority) -> None:
    AUTHORITY[:] = [authority]


def build_claim(folder: Path, seed: int) -> Path:
    stamped_claims(AUTHORITY[0])[seed - 1].save(folder / "claim.json")
    return folder / "claim.json"


def build_head(folder: Path, seed: int) -> Path:
    head = TreeHead.make_unsigned("ab" * 32, seed, f"{seed:02x}" * 32).with_signature(SIGNER)
    AUTHORITY[0].stamp(head).save(folder / "head.json")
    return folder / "head.json"


def read_signed(path: Path) -> Any:
    """What is signed in a document, by whom; its stamps are added by anybody."""
    document = load_signed_document(path)
    document.check_signatures()
    for each in find_confirmed_timestamps(document, [AUTHORITY[0].pinned]):
        each.to_json()
    return type(document).__name__, document.statement.model_dump(), document.signers


def build_stamp(folder: Path, seed: int) -> Path:
    (folder / "stamp.der").write_bytes(
        stamped_claims(AUTHORITY[0])[seed - 1].timestamp_responses[0]
    )
    return folder / "stamp.der"


def read_stamp(path: Path) -> Any:
    claims = [replace_stamps(each) for each in stamped_claims(AUTHORITY[0])]
    found = []
    for claim in claims:
        try:
            stamps = find_confirmed_timestamps(
                claim.with_timestamp(path.read_bytes()), [AUTHORITY[0].pinned]
            )
        except CountermarkError:
            continue
        found += [(claim.digest, each.stamp.time) for each in stamps]
    if not found:
        claims[0].with_timestamp(path.read_bytes())
        raise CountermarkError("the stamp is of neither claim")
    return found


def replace_stamps(claim: Claim) -> Claim:
    return claim.model_copy(update={"timestamps": ()})


def build_growth(folder: Path, seed: int) -> Path:
    path = tuple(f"{n:02x}" * 32 for n in range(seed, seed + 3))
    ConsistencyProof(type="countermark/growth/v1", path=path).save(folder / "growth.json")
    return folder / "growth.json"


def build_authority(folder: Path, seed: int) -> Path:
    del seed
    shutil.copy(AUTHORITY[0].root, folder / "root.pem")
    return folder / "root.pem"


def read_authority(path: Path) -> Any:
    authority = Authority.load(path)
    claim = stamped_claims(AUTHORITY[0])[0]
    return bool(find_confirmed_timestamps(claim, [authority])) or None


def build_public(folder: Path, seed: int) -> Path:
    del seed
    write_key_pair(folder / "a")
    (folder / "a.pem").unlink()
    return folder / "a.pub"


def build_bundle(folder: Path, seed: int) -> Path:
    key = replace(known_key(), material=replace(KeyMaterial.from_test_seed(seed), test_key=False))
    weights = np.random.default_rng(seed).normal(size=(16, 32)).astype(np.float32)
    record = make_record(examine(InMemory({"fc.weight": weights}), key, VerificationOptions()))
    assert record is not None
    signer = Ed25519PrivateKey.from_private_bytes(bytes(32))
    save_bundle(folder / "bundle", make_bundle_files(record, None, None, signer))
    return folder / "bundle"


def read_bundle(path: Path) -> Any:
    return replay_bundle(path).verdict.to_json()


# --- transcripts and images


def build_transcript(folder: Path, seed: int) -> Path:
    entries = [
        TranscriptEntry(
            image=digest_image(image), request="ab" * 32, answer="cd" * 32, status=200, attempts=1,
            label=at + seed, why=None,
        )
        for at, image in enumerate(images_of(5))
    ]  # fmt: skip
    Transcript(
        type="countermark/transcript/v1", url="http://x/", protocol="mlflow",
        options={"batch": 3, "class_names": []}, started="2026-01-01T00:00:00Z",
        entries=tuple(entries),
    ).save(folder / "t.json")  # fmt: skip
    return folder / "t.json"


def read_transcript(path: Path) -> Any:
    transcript = Transcript.load(path)
    transcript.subject()
    return {"labels": np.asarray(transcript.make_replay()(images_of(5)), dtype=np.float64)}


def build_image(folder: Path, seed: int, *, form: str) -> Path:
    levels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    PIL.Image.fromarray(levels).save(folder / f"i.{form}")
    return folder / f"i.{form}"


def read_image(path: Path) -> Any:
    """As one of a folder of images, where a reason stands for an error; and as a logo."""
    found = {}
    for each in ImageFolder(path.parent, 16).read():
        assert (each.picture is None) == bool(each.reason)
        if each.picture is not None:
            found[each.name] = each.picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["logo"] = read_logo(str(path))
    return found


READERS: Mapping[str, Reader] = {
    "safetensors": Reader(build_safetensors, read_weights),
    "codes": Reader(build_codes, read_weights),
    "sharded": Reader(build_sharded, read_weights),
    "torch": Reader(build_torch, read_weights, mend=mend_zip, memory=PICKLE_MEMORY),
    "legacy_torch": Reader(build_legacy_torch, read_weights, memory=PICKLE_MEMORY),
    "script": Reader(build_script, read_weights, mend=mend_zip, memory=PICKLE_MEMORY),
    "frozen_script": Reader(
        functools.partial(build_script, frozen=True),
        read_weights,
        mend=mend_zip,
        memory=PICKLE_MEMORY,
    ),
    "training": Reader(build_training, read_trapped, memory=PICKLE_MEMORY, share=2),
    "legacy_training": Reader(
        functools.partial(build_training, zipped=False), read_trapped, memory=PICKLE_MEMORY, share=2
    ),
    "torch_shards": Reader(build_torch_shards, read_weights, memory=PICKLE_MEMORY, share=2),
    "distributed": Reader(build_distributed, read_weights, memory=PICKLE_MEMORY, share=2),
    "program": Reader(build_program, read_weights, memory=PICKLE_MEMORY, share=2),
    "onnx": Reader(build_onnx, read_weights),
    "external_onnx": Reader(build_external_onnx, read_weights),
    "gguf": Reader(build_gguf, read_weights),
    "blobs": Reader(build_blobs, read_weights),
    "key": Reader(build_key, read_key, is_bound=True, mend=mend_key),
    "openings": Reader(build_openings, read_openings, is_bound=True),
    "claim": Reader(build_claim, read_signed, is_bound=True),
    "head": Reader(build_head, read_signed, is_bound=True),
    "stamp": Reader(build_stamp, read_stamp, is_bound=True),
    "growth": Reader(
        build_growth, lambda path: {"size": np.array(len(ConsistencyProof.load(path).path))}
    ),
    "authority": Reader(build_authority, read_authority),
    "public_key": Reader(build_public, lambda path: bool(compute_key_id(load_public_key(path)))),
    "bundle": Reader(build_bundle, read_bundle, is_bound=True),
    "transcript": Reader(build_transcript, read_transcript),
    **{
        f"image_{form}": Reader(
            functools.partial(build_image, form=form), read_image, most=6 * MAX_PIXELS, share=0.3
        )
        for form in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm")
    },
}


# --- the test


@contextmanager
def bounded_memory(most: int) -> Iterator[None]:
    """Let allocations fail beyond `most` more than there is: `MemoryError` is none of ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def files_of(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def answer_of(reader: Reader, path: Path) -> Any:
    """What a reader gives, or the error that is one of ours."""
    try:
        return reader.read(path)
    except CountermarkError as error:
        one_line(error)
        return error


def is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_alike(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    return bool(one == other)


def require_plausible(answer: Any, most: int) -> None:
    """Finite arrays, together of so many values at most."""
    arrays = list(answer.values()) if isinstance(answer, dict) else []
    assert all(np.isfinite(each).all() for each in arrays)
    assert sum(each.size for each in arrays) <= most


def fuzz(name: str, folder: Path, numbers: Iterable[int]) -> Counter[str]:
    """Damage a kind of file once for each number, which is the seed.

    Returns: how often it was refused, read alike, and read as another valid file.
    """
    reader, outcomes = READERS[name], Counter[str]()
    places = [folder / "one", folder / "other"]
    for place in places:
        place.mkdir()
    path, other = (reader.build(place, seed) for place, seed in zip(places, (1, 2), strict=True))
    before = [answer_of(reader, each) for each in (path, other)]
    valid = [{each: each.read_bytes() for each in files_of(of)} for of in (path, other)]
    for number in numbers:
        drawn = random.Random(f"{name} {number}")  # noqa: S311
        at = drawn.randrange(len(valid[0]))
        damaged, content = list(valid[0].items())[at]
        kind = drawn.choice(list(MUTATIONS))
        mutated = content
        for _ in range(drawn.choice((1, 1, 1, 2, 3))):
            mutated = MUTATIONS[kind](mutated or b"\0", list(valid[1].values())[at], drawn)
        damaged.write_bytes(mutated)
        if reader.mend is not None and drawn.random() < 0.7:
            reader.mend(path)
        try:
            with bounded_memory(reader.memory):
                answer = answer_of(reader, path)
            if isinstance(answer, CountermarkError):
                outcomes["refused"] += 1
            elif any(is_alike(answer, each) for each in before):
                outcomes["alike"] += 1
            else:
                assert not reader.is_bound, "another answer, where one is bound"
                size = sum(each.stat().st_size for each in files_of(path))
                require_plausible(answer, reader.most or LARGEST_ANSWER * size)
                outcomes["another"] += 1
        except BaseException as error:
            error.add_note(f"{name}, mutation {number}, {kind} of {damaged.name}")
            raise
        for each, content in valid[0].items():
            each.write_bytes(content)
    return outcomes


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    found = fuzz(name, tmp_path, range(round(FEW * READERS[name].share)))
    assert found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_files_damaged_in_many_ways_are_refused_or_read(name: str, tmp_path: Path) -> None:
    found = fuzz(name, tmp_path, range(MANY))
    sys.stderr.write(f"{name}: {dict(found)}\n")
