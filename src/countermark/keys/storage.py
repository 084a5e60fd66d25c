"""A key on disk: a folder with `key.safetensors` (tensors) and `key.json` (everything readable).

The folder is written beside its place under another name and renamed as a whole, never over another
key. With a passphrase the tensors are encrypted with AES-256-GCM-SIV under a key that Argon2id
derives, and `key.json` is the associated data. `docs/format.md` describes every field.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from countermark._internal import files
from countermark._internal.files import Hex32, StoredDocument
from countermark._version import VERSION
from countermark.errors import KeyFileError, make_printable
from countermark.keys.key import SECRET_BYTES, Key, KeyMaterial

# Bytes that are read at most, 32 MiB and 4 GiB: a key folder may come from anybody. Earlier versions
# wrote every name in full, which takes 70 bytes a tensor.
_LARGEST_JSON, _LARGEST_TENSORS = 1 << 25, 1 << 32
_MOST_TENSORS = 1 << 18
# More tensors than this are written packed; fewer stay readable, and older versions open them.
_MOST_LISTED = 1000
_PACKED = "zlib+base64:"
_MOST_PASSES_KIB = 1 << 22  # that Argon2id may write in all: iterations times memory
# The secret lies beside the tensors in one file, under a name without a prefix.
_FROZEN, _LEARNT = "frozen.", "learnt."

Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Hex12 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{24}$")]
Size = Annotated[int, Field(ge=1, le=1 << 40)]


class Encryption(StoredDocument):
    """Parameters of the encryption: Argon2id (RFC 9106) and AES-256-GCM-SIV (RFC 8452)."""

    kdf: Literal["argon2id"]
    cipher: Literal["aes-256-gcm-siv"]
    salt: Hex16
    nonce: Hex12
    # Whoever reads a foreign key spends the time and memory that these numbers ask for. The bounds
    # stop a hostile key from asking for more than a gibibyte.
    iterations: Annotated[int, Field(ge=1, le=64)]
    lanes: Annotated[int, Field(ge=1, le=64)]
    memory_kib: Annotated[int, Field(ge=8 * 1024, le=1 << 20)]

    @model_validator(mode="after")
    def _check_derivation_cost(self) -> Self:
        """Refuse parameters that would keep the reader of a hostile key busy too long."""
        if self.iterations * self.memory_kib > _MOST_PASSES_KIB:
            raise ValueError(
                f"iterations times memory_kib is {self.iterations * self.memory_kib:,}: expected "
                f"{8 * 1024:,} to {_MOST_PASSES_KIB:,}"
            )
        return self

    @classmethod
    def generate(cls) -> Encryption:
        """Return today's parameters, with a salt and a nonce from the operating system."""
        return cls(
            kdf="argon2id",
            cipher="aes-256-gcm-siv",
            # The second recommended parameter set of RFC 9106, section 4: 64 MiB, 3 iterations, 4
            # lanes.
            salt=os.urandom(16).hex(),
            nonce=os.urandom(12).hex(),
            iterations=3,
            lanes=4,
            memory_kib=64 * 1024,
        )


class KeyHeader(StoredDocument):
    """The content of `key.json`: exactly these fields, all of them, and no secret among them."""

    type: Literal["countermark/key/v1"]
    scheme: str
    fields: dict[str, Any]
    tensors: dict[str, list[Size]]
    owner: str
    nonce: Hex16
    C0: Hex32
    C1: Hex32 | None
    tensors_sha256: Hex32
    test_key: bool
    encryption: Encryption | None
    model: str | None
    model_arguments: dict[str, Any]
    version: str

    def encode_associated_data(self) -> bytes:
        """Return the bytes that the cipher authenticates beside the tensors.

        Returns: the canonical JSON of the header without the digest of `key.safetensors`.

        Raises:
            KeyFileError: the header has no canonical JSON (RFC 8785) and could not be read again.
        """
        try:
            # The digest is that of the ciphertext, which does not exist yet when it is
            # authenticated.
            return rfc8785.dumps(self.model_dump(exclude={"tensors_sha256"}))
        except rfc8785.CanonicalizationError as error:
            raise KeyFileError(
                f"a value in the key's fields or model arguments has no canonical JSON ({error}): "
                "expected finite numbers, and whole numbers below 2^53"
            ) from None

    @property
    def commitment(self) -> str:
        """C1 if the key has one, else C0, in hexadecimal."""
        return self.C1 or self.C0

    def to_bytes(self) -> bytes:
        """Return the content of `key.json`, with long lists packed."""
        packed = self.model_copy(
            update={
                "tensors": _pack_long(self.tensors),
                "fields": {name: _pack_long(each) for name, each in self.fields.items()},
            }
        )
        # Packed text stands where the model declares lists, which pydantic would warn about.
        return packed.model_dump_json(indent=2, warnings=False).encode() + b"\n"


class _ReadHeader(KeyHeader):
    """The header of a `key.json` that is read: its packed lists are unpacked."""

    @field_validator("tensors", mode="before")
    @classmethod
    def _unpack_tensors(cls, value: Any) -> Any:
        """Unpack the tensors of a key that reads many."""
        return _unpack_long(value)

    @field_validator("fields", mode="before")
    @classmethod
    def _unpack_fields(cls, value: Any) -> Any:
        """Unpack long fields, such as the names of many layers."""
        if not isinstance(value, dict):
            return value
        return {name: _unpack_long(each) for name, each in value.items()}


def save_key(key: Key, folder: Path, passphrase: str | None = None) -> None:
    """Write a key to a new folder (0700, files 0600), whole or not at all.

    Args:
        key: the key.
        folder: path of the new folder; must not exist yet.
        passphrase: encrypts secret and tensors; None leaves them readable by their owner only.

    Raises:
        KeyFileError: the folder's name is taken (the existing file or folder is left untouched), the
            passphrase is empty, or the key could not be read again.
    """
    refuse_existing(folder)
    _require_few_tensors(len(key.tensors))
    if passphrase == "":
        raise KeyFileError("an empty passphrase protects nothing: give one, or None for no cipher")
    encryption = None if passphrase is None else Encryption.generate()
    header = _make_header(key, encryption)
    authenticated = header.encode_associated_data()
    content = _encode_tensors(key)
    if encryption and passphrase is not None:
        cipher = AESGCMSIV(_derive_cipher_key(encryption, passphrase))
        sealed = cipher.encrypt(bytes.fromhex(encryption.nonce), content, authenticated)
        content = save({"ciphertext": np.frombuffer(sealed, dtype=np.uint8)})
    header = header.model_copy(update={"tensors_sha256": hashlib.sha256(content).hexdigest()})
    written = header.to_bytes()
    _require_same_header(folder, written, header)
    # One rename makes both files appear: no other process sees one file without the other.
    files.write_folder(folder, {"key.safetensors": content, "key.json": written})


def _require_same_header(folder: Path, written: bytes, header: KeyHeader) -> None:
    """Raise `KeyFileError` if a `key.json` would not be read back as it was meant."""
    try:
        if len(written) > _LARGEST_JSON:
            raise ValueError(
                f"it would have {len(written):,} bytes, and {_LARGEST_JSON:,} are read"
            )
        if files.parse_document(_ReadHeader, written).model_dump() != header.model_dump():
            raise ValueError(f"a field holds text that begins with {_PACKED!r}, as packed lists do")
    except ValueError as error:
        raise KeyFileError(
            f"{folder} is not written, because its key.json could not be read again: "
            f"{make_printable(str(error), 200)}; expected fewer tensors, or other fields"
        ) from None


def refuse_existing(folder: Path) -> None:
    """Raise `KeyFileError` if a file or folder has the name of a key to be written."""
    if os.path.lexists(folder):
        raise KeyFileError(
            f"{folder} exists, and a key is never overwritten: choose another name or move it away"
        )


def refuse_nested(key: Path, model: Path) -> None:
    """Raise `KeyFileError` if a key would lie inside a model, or a model inside a key."""
    # A model folder is published and a key is secret. Links are followed before comparing.
    inner, outer = key.resolve(), model.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise KeyFileError(f"{key} and {model} lie in each other: a key never lies there")


def load_header(folder: Path) -> KeyHeader:
    """Read and check `key.json`, without a passphrase and without touching the secret.

    Raises:
        KeyFileError: the file is missing, too large, not a key or of an unknown version, or a field
            is unknown, missing or there twice.
    """
    content = _read_file(folder, "key.json", _LARGEST_JSON)
    try:
        header = files.parse_document(_ReadHeader, content)
    except ValueError as error:
        raise _make_header_error(folder, str(error)) from None
    _require_few_tensors(len(header.tensors))
    # Raises here for values without canonical JSON, not only when the commitment is computed.
    header.encode_associated_data()
    return header


def _make_header_error(folder: Path, why: str) -> KeyFileError:
    """Return the error for a `key.json` that cannot be used."""
    return KeyFileError(
        f"{folder / 'key.json'}: {make_printable(why, 200)}; "
        "expected a key of type countermark/key/v1 as `countermark embed` writes it"
    )


def load_key(folder: Path, passphrase: str | None = None) -> Key:
    """Read a key folder and check that its content agrees with its commitment.

    Raises:
        KeyFileError: the key is damaged, truncated or forged (a digest, C0 or C1 does not agree),
            or it is encrypted and the passphrase is missing or wrong.
    """
    header = load_header(folder)
    content = _read_file(folder, "key.safetensors", _LARGEST_TENSORS)
    if hashlib.sha256(content).hexdigest() != header.tensors_sha256:
        raise KeyFileError(
            f"{folder}: key.safetensors is not the file that key.json describes "
            "(truncated or exchanged): restore both from one backup"
        )
    tensors = _decode_tensors(folder, content, header, passphrase)
    secret = tensors.pop("secret", np.zeros(0, dtype=np.uint8))
    if secret.shape != (SECRET_BYTES,) or secret.dtype != np.uint8:
        raise KeyFileError(f"{folder}: key.safetensors holds no secret of {SECRET_BYTES} bytes")
    for name in tensors:
        if not name.startswith((_FROZEN, _LEARNT)):
            raise KeyFileError(
                f"{folder}: key.safetensors holds {make_printable(name, 200)!r}: "
                f"expected the secret and names that begin with {_FROZEN!r} or {_LEARNT!r}"
            )
    key = Key(
        scheme=header.scheme,
        fields=header.fields,
        tensors={name: tuple(shape) for name, shape in header.tensors.items()},
        owner=header.owner,
        material=KeyMaterial(secret.tobytes(), bytes.fromhex(header.nonce), header.test_key),
        frozen=_select_tensors(_FROZEN, tensors),
        learnt=_select_tensors(_LEARNT, tensors),
        model=header.model,
        model_arguments=header.model_arguments,
    )
    # The digest above finds damage only. C0 and C1 show that fields, tensors and secret still
    # belong to the commitment, which a claim may have dated.
    for which, follows, written in (
        ("C0", key.c0.hex(), header.C0),
        ("C1", _encode_hex(key.c1), header.C1),
    ):
        if follows != written:
            raise KeyFileError(
                f"{folder}: the commitment {which} does not follow from the key's content: "
                "something was changed after the key was made, so it can prove nothing"
            )
    return key


def _pack_long(value: Any) -> Any:
    """Return a long list or object of a key as packed text, and every other value unchanged.

    The names of a large model repeat themselves, so that packed ones take a few bytes each.
    """
    if not isinstance(value, list | dict) or len(value) <= _MOST_LISTED:
        return value
    packed = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)
    return _PACKED + base64.b64encode(packed).decode()


def _unpack_long(value: Any) -> Any:
    """Return the list or object that `_pack_long` packed, and every other value unchanged.

    Raises:
        ValueError: the packed form is damaged, or larger than a key may be.
    """
    if not isinstance(value, str) or not value.startswith(_PACKED):
        return value
    inflater = zlib.decompressobj()
    try:
        # A few packed kilobytes can hold gigabytes: no more than the limit is unpacked.
        content = inflater.decompress(
            base64.b64decode(value.removeprefix(_PACKED), validate=True), _LARGEST_JSON
        )
    except zlib.error as error:
        raise ValueError(f"packed text is damaged ({error})") from None
    if not inflater.eof or inflater.unused_data:
        raise ValueError(f"packed text is cut, or unpacks to more than {_LARGEST_JSON:,} bytes")
    files.require_few_parts(content)
    return files.parse_json(content)


def _require_few_tensors(count: int) -> None:
    """Raise `KeyFileError` if a key reads more tensors than its file may list."""
    if count > _MOST_TENSORS:
        raise KeyFileError(
            f"the key reads {count:,} tensors: expected at most {_MOST_TENSORS:,}; choose fewer"
        )


def _encode_hex(digest: bytes | None) -> str | None:
    """Return a digest in hexadecimal, and None for None."""
    return None if digest is None else digest.hex()


def _select_tensors(prefix: str, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the tensors whose names have a prefix, under their names without it."""
    return {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}


def _make_header(key: Key, encryption: Encryption | None) -> KeyHeader:
    """Build the header of a key; the digest of `key.safetensors` is filled in later."""
    return KeyHeader(
        type="countermark/key/v1",
        scheme=key.scheme,
        fields=dict(key.fields),
        tensors={name: list(shape) for name, shape in key.tensors.items()},
        owner=key.owner,
        nonce=key.material.nonce.hex(),
        C0=key.c0.hex(),
        C1=_encode_hex(key.c1),
        # A stand-in: the header is authenticated before the content has its digest.
        tensors_sha256="0" * 64,
        test_key=key.test_key,
        encryption=encryption,
        model=key.model,
        model_arguments=dict(key.model_arguments),
        version=VERSION,
    )


def _encode_tensors(key: Key) -> bytes:
    """Return secret, frozen and learnt tensors as the content of a safetensors file."""
    tensors = {"secret": np.frombuffer(key.material.secret, dtype=np.uint8)}
    for prefix, named in ((_FROZEN, key.frozen), (_LEARNT, key.learnt)):
        tensors |= {prefix + name: np.asarray(each, order="C") for name, each in named.items()}
    return save(tensors)


def _read_file(folder: Path, name: str, largest: int) -> bytes:
    """Read one file of a key folder, of at most `largest` bytes.

    Raises:
        KeyFileError: the file is missing, not a regular file, too large, or changes meanwhile.
    """
    path = folder / name
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"{path} is not a regular file: expected one as a key has it")
        if size > largest:
            raise KeyFileError(f"{path} has {size:,} bytes, a key has at most {largest:,}")
        # One byte more than expected shows a file that grows while it is read.
        with path.open("rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be read ({error.strerror}): expected a key folder "
            "with key.json and key.safetensors"
        ) from None
    if len(content) != size:
        raise KeyFileError(f"{path} changed while it was read: try again")
    return content


def _decode_tensors(
    folder: Path, content: bytes, header: KeyHeader, passphrase: str | None
) -> dict[str, NDArray[Any]]:
    """Decode the content of `key.safetensors`, after decrypting it if the header says so.

    Raises:
        KeyFileError: the content is damaged, or cannot be decrypted with this passphrase.
    """
    try:
        tensors: dict[str, NDArray[Any]] = load(content)
        if header.encryption is not None:
            # A plain tensor beside the ciphertext would be one that the passphrase does not
            # protect.
            if tensors.keys() != {"ciphertext"}:
                raise ValueError("expected one tensor, ciphertext")
            sealed = tensors["ciphertext"].tobytes()
            tensors = load(_decrypt_tensors(folder, sealed, header, passphrase))
    except (SafetensorError, KeyError, ValueError) as error:
        raise KeyFileError(f"{folder}: key.safetensors is damaged ({error})") from None
    return tensors


def _decrypt_tensors(
    folder: Path, sealed: bytes, header: KeyHeader, passphrase: str | None
) -> bytes:
    """Decrypt the tensors of an encrypted key.

    Raises:
        KeyFileError: the passphrase is missing or wrong, or the header was changed.
    """
    encryption = header.encryption
    if encryption is None or passphrase is None:
        raise KeyFileError(
            f"{folder} is encrypted: give the passphrase at the prompt, "
            "or a file with it in COUNTERMARK_PASSPHRASE_FILE"
        )
    cipher = AESGCMSIV(_derive_cipher_key(encryption, passphrase))
    try:
        # The associated data is computed from the header as read, so a changed `key.json` fails
        # here and looks like a wrong passphrase: the cipher cannot tell the two apart.
        nonce = bytes.fromhex(encryption.nonce)
        return cipher.decrypt(nonce, sealed, header.encode_associated_data())
    except InvalidTag:
        raise KeyFileError(
            f"{folder}: wrong passphrase, or key.json was changed after the key was made"
        ) from None


def _derive_cipher_key(encryption: Encryption, passphrase: str) -> bytes:
    """Derive the 32-byte cipher key from a passphrase with Argon2id.

    Raises:
        KeyFileError: the machine has less free memory than the header asks for.
    """
    kdf = Argon2id(
        salt=bytes.fromhex(encryption.salt),
        length=32,
        iterations=encryption.iterations,
        lanes=encryption.lanes,
        memory_cost=encryption.memory_kib,
    )
    try:
        return kdf.derive(passphrase.encode())
    except MemoryError:
        raise KeyFileError(
            f"the key's Argon2id needs {encryption.memory_kib:,} KiB of memory, which are not free"
        ) from None
