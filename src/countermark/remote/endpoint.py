"""A remote suspect as a function from images to labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Self

import numpy as np

from countermark.answers import Images, Labels
from countermark.errors import ConfigError, MissingExtraError
from countermark.progress import progress
from countermark.remote.address import address, shown
from countermark.remote.answers import Reading, read_answer, unread
from countermark.remote.headers import secret_headers
from countermark.remote.images import NO_LABEL, fitting, image_digest
from countermark.remote.options import RemoteOptions
from countermark.remote.pace import Pace
from countermark.remote.protocols import PROTOCOLS, content_type
from countermark.remote.transcript import TYPE, Entry, Transcript
from countermark.remote.wire import Reply, Wire
from countermark.subject import Subject


def connect(url: str, options: RemoteOptions) -> Endpoint:
    """A remote suspect that can be asked; nothing is sent before the first image.

    Args:
        url: http(s), of the server or of the model; a query is sent but never recorded.
        options: how to ask.

    Raises:
        ConfigError: the url or the file that COUNTERMARK_HEADERS_FILE names cannot be used.
        MissingExtraError: the extra `remote` is not installed.
    """
    complete = address(url, options)
    headers = {"accept": "application/json"} | secret_headers()
    _need_extra(options)
    wire = Wire(complete, headers | {"content-type": content_type(options)}, options.largest_answer)
    return Endpoint(shown(complete), options, wire)


def _need_extra(options: RemoteOptions) -> None:
    try:
        import httpx2  # noqa: F401 (only whether it is there)

        if options.sends_pictures:
            import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError("asking a remote suspect", "remote") from None


class Endpoint:
    """A remote suspect: call it with images, then keep its transcript. Made by `connect`.

    A context manager: its end closes the connection, and the transcript stays.
    """

    def __init__(self, url: str, options: RemoteOptions, wire: Wire) -> None:
        self.url, self.options = url, options
        self._wire, self._pace = wire, Pace(options)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._entries: list[Entry] = []

    def __call__(self, images: Images) -> Labels:
        """Labels int64 (n,) of images uint8 (n, C, H, W); −1 where none could be had or read.

        Whatever the suspect does, nothing is raised for it; the transcript says what happened.

        Raises:
            ConfigError: the images cannot be sent as the options say, or would exceed the budget.
        """
        images = fitting(images, self.options)
        self._within_budget(len(images))
        already = len(self._entries)
        with self._pace.asking(), progress("asking the suspect", len(images)) as advance:
            for batch in self._batches(images):
                self._entries += self._ask(batch)
                advance(len(batch))
        labels = [entry.label for entry in self._entries[already:]]
        return np.array([NO_LABEL if each is None else each for each in labels], dtype=np.int64)

    def subject(self) -> Subject:
        """Describe the service as a verdict records it: by its transcript so far."""
        return self.transcript.subject()

    @property
    def transcript(self) -> Transcript:
        """The record of everything that was asked so far."""
        return Transcript(
            type=TYPE,
            url=self.url,
            protocol=self.options.protocol,
            options=self.options.public(),
            started=self._started,
            entries=tuple(self._entries),
        )

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.options.protocol}, asked={len(self._entries)})"

    def _within_budget(self, count: int) -> None:
        if len(self._entries) + count > self.options.budget:
            raise ConfigError(
                f"expected at most {self.options.budget:,} images in all, came {count:,} after "
                f"{len(self._entries):,}: raise the budget or ask about fewer"
            )

    def _batches(self, images: Images) -> Iterator[Images]:
        size = self.options.images_a_request
        for start in range(0, len(images), size):
            yield images[start : start + size]

    def _ask(self, batch: Images) -> list[Entry]:
        """The entries of images that share one request, unless the time for it is over."""
        if not self._pace.left():
            return self._entries_of(batch, None, self._late(Reply()), 0)
        body = PROTOCOLS[self.options.protocol].body(batch, self.options)
        reply, attempts = self._persist(body)
        return self._entries_of(batch, body if attempts else None, reply, attempts)

    def _persist(self, body: bytes) -> tuple[Reply, int]:
        """The last reply, and how many attempts were made: until one helps or none may be."""
        reply, pause = Reply(), 0.0
        for attempts in range(self.options.retries + 1):
            if not self._pace.turn(pause):
                return self._late(reply), attempts
            reply = self._wire.post(body, min(self.options.timeout, self._pace.left()))
            if not reply.again:
                return reply, attempts + 1
            pause = self._pace.after(attempts + 1, reply.wait)
        return reply, self.options.retries + 1

    def _late(self, reply: Reply) -> Reply:
        over = f"the deadline of {self.options.deadline:g} s left no time to ask"
        return replace(reply, why=f"{reply.why}; {over} again" if reply.why else over)

    def _entries_of(
        self, batch: Images, body: bytes | None, reply: Reply, attempts: int
    ) -> list[Entry]:
        return [
            Entry(
                image=image_digest(image),
                request=_sha256(body),
                answer=_sha256(reply.body),
                status=reply.status,
                attempts=attempts,
                label=reading.label,
                why=reading.why,
            )
            for image, reading in zip(batch, self._readings(reply, len(batch)), strict=True)
        ]

    def _readings(self, reply: Reply, count: int) -> list[Reading]:
        if reply.why is not None or reply.body is None:
            return [unread(reply.why or "no answer")] * count
        return read_answer(reply.body, count, self.options)


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()
