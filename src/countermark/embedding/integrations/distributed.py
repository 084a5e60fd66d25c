"""DDP and FSDP2: make sure that every rank embeds the same mark.

`penalty()` and `attach` need only the same secret on all ranks. Sharded tensors are gathered, so
all ranks together must call `penalty`, `end_epoch`, `key` and every optimizer step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from countermark.embedding import Embedding
from countermark.errors import LoopError
from countermark.keys.key import Key, KeyMaterial, digest_tensor


def shared_material() -> KeyMaterial:
    """Draw a secret and a nonce on rank 0 and return them on every rank, as `material` of `embed`.

    They travel over the same network as the gradients. Without a process group the result is
    `KeyMaterial.generate()`.

    Raises:
        LoopError: several processes were started, and there is no process group yet.
    """
    if not _is_distributed():
        # torchrun sets WORLD_SIZE: each process would silently draw a secret of its own.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LoopError(
                "there is no process group to share a secret in: call "
                "torch.distributed.init_process_group() before"
            )
        return KeyMaterial.generate()
    # Only rank 0's draw is used; broadcasting overwrites the others.
    drawn = [KeyMaterial.generate()]
    dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def require_agreement(mark: Embedding) -> None:
    """Raise unless key, reader, its optimizer and its random numbers are the same on all ranks.

    Every rank must call this function. The ranks exchange digests only.

    Raises:
        LoopError: a rank differs from rank 0; raised on every rank, and names the ranks.
    """
    if not _is_distributed():
        return
    # All ranks see all digests, so that all raise together and none waits in a later collective.
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, _compute_digest(mark))
    differing = [str(rank) for rank, each in enumerate(digests) if each != digests[0]]
    if differing:
        who = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {', '.join(differing)}"
        raise LoopError(
            f"{who} of {len(digests)} {'embeds' if len(differing) == 1 else 'embed'} another mark "
            "than rank 0: give embed the same material=shared_material() and the same weights on "
            "every rank"
        )


def agreed_key(mark: Embedding) -> Key:
    """Return `mark.key` after checking that every rank has the same key; every rank must call it.

    Raises:
        LoopError: as `require_agreement` and `mark.key`.
        MarkNotTakenError: as `mark.key`.
    """
    require_agreement(mark)
    return mark.key


def _is_distributed() -> bool:
    """Return true if there is a process group."""
    return dist.is_available() and dist.is_initialized()


def _compute_digest(mark: Embedding) -> str:
    """Return the SHA-256 of the key's commitment and the mark's state, in hexadecimal."""
    key = mark.drawn_key
    hashed = hashlib.sha256(b"" if key is None else key.commitment.encode())
    for name, value in _iterate_leaves("", mark.state()):
        if isinstance(value, torch.Tensor):
            # Digests are over float64 on the CPU: device and storage format must not matter.
            hashed.update(digest_tensor(name, value.detach().cpu().double().numpy()))
        else:
            hashed.update(hashlib.sha256(f"{name}={value!r}".encode()).digest())
    return hashed.hexdigest()


def _iterate_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested state, each with its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for inner, each in value.items():
        yield from _iterate_leaves(f"{name}.{inner}", each)
