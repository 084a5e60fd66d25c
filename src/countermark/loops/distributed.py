"""DDP and FSDP2: every rank embeds the same mark, and makes sure of it.

`penalty()` and `attach` need no more than that the ranks hold the same secret. Sharded tensors are
gathered, so `penalty`, `end_epoch`, `key` and every optimizer step are for all ranks together.
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
from countermark.key import Key, KeyMaterial, tensor_digest


def shared_material() -> KeyMaterial:
    """Draw a secret and a nonce on rank 0 and hand them to every rank, as `material` of `embed`.

    They travel as the gradients do. Without a process group it is `KeyMaterial.fresh()`.

    Raises:
        LoopError: several processes were started, and there is no process group yet.
    """
    if not _distributed():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LoopError(
                "there is no process group to share a secret in: call "
                "torch.distributed.init_process_group() before"
            )
        return KeyMaterial.fresh()
    drawn = [KeyMaterial.fresh()]
    dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def require_agreement(mark: Embedding) -> None:
    """Make sure that key, reader, its optimizer and its random numbers are the same on all ranks.

    Every rank must call it. What the ranks compare are digests.

    Raises:
        LoopError: names the ranks that differ from rank 0, on every rank.
    """
    if not _distributed():
        return
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, _digest(mark))
    differing = [str(rank) for rank, each in enumerate(digests) if each != digests[0]]
    if differing:
        who = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {', '.join(differing)}"
        raise LoopError(
            f"{who} of {len(digests)} {'embeds' if len(differing) == 1 else 'embed'} another mark "
            "than rank 0: give embed the same material=shared_material() and the same weights on "
            "every rank"
        )


def agreed_key(mark: Embedding) -> Key:
    """`mark.key`, once every rank has the same; every rank must call it.

    Raises:
        LoopError: as `require_agreement` and `mark.key`.
        MarkNotTakenError: as `mark.key`.
    """
    require_agreement(mark)
    return mark.key


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _digest(mark: Embedding) -> str:
    key = mark.drawn_key
    hashed = hashlib.sha256(b"" if key is None else key.commitment.encode())
    for name, value in _leaves("", mark.state()):
        if isinstance(value, torch.Tensor):
            hashed.update(tensor_digest(name, value.detach().cpu().double().numpy()))
        else:
            hashed.update(hashlib.sha256(f"{name}={value!r}".encode()).digest())
    return hashed.hexdigest()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a nested state holds, each with its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for inner, each in value.items():
        yield from _leaves(f"{name}.{inner}", each)
