"""A remote suspect as a function from images to labels, with a record of all requests."""

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
    """Prepare to ask a remote suspect; nothing is sent before the first image.

    Args:
        url: http(s), of the server or of the model; a query is sent but never recorded.
        options: protocol, form of images and answers, limits.

    Raises:
        ConfigError: the url, or the file that COUNTERMARK_HEADERS_FILE names, cannot be used.
        MissingExtraError: the extra `remote` is not installed.
    """
    complete = address(url, options)
    # A user may replace Accept, but not the content type, which has to fit the body.
    headers = {"accept": "application/json"} | secret_headers()
    _need_extra(options)
    wire = Wire(complete, headers | {"content-type": content_type(options)}, options.largest_answer)
    # The endpoint knows the url only without its query, so no record can hold a token.
    return Endpoint(shown(complete), options, wire)


def _need_extra(options: RemoteOptions) -> None:
    """Raise `MissingExtraError` unless the packages that these options need are installed."""
    try:
        import httpx2  # noqa: F401 (only whether it is there)

        if options.sends_pictures:
            import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError("asking a remote suspect", "remote") from None


class Endpoint:
    """A remote suspect: call it with images, then save its transcript.

    A context manager: leaving the block closes the connection; the transcript remains. Call
    `connect` to make an instance.

    Args:
        url: as transcripts show it.
        options: protocol, form of images and answers, limits.
        wire: the connection.
    """

    def __init__(self, url: str, options: RemoteOptions, wire: Wire) -> None:
        self.url, self.options = url, options
        self._wire, self._pace = wire, Pace(options)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._entries: list[Entry] = []

    def __call__(self, images: Images) -> Labels:
        """Ask for the labels int64 (n,) of images uint8 (n, C, H, W).

        Whatever the suspect does, no error is raised. An image without a readable label gets −1,
        and the transcript holds the reason.

        Raises:
            ConfigError: the images cannot be sent as the options say, or would exceed the budget.
        """
        images = fitting(images, self.options)
        # Checked for all images before the first is sent: a service may charge for each request.
        self._within_budget(len(images))
        already = len(self._entries)
        with self._pace.asking(), progress("asking the suspect", len(images)) as advance:
            for batch in self._batches(images):
                # Recorded batch by batch, so that Ctrl-C keeps the answers that were paid for.
                self._entries += self._ask(batch)
                advance(len(batch))
        labels = [entry.label for entry in self._entries[already:]]
        return np.array([NO_LABEL if each is None else each for each in labels], dtype=np.int64)

    def subject(self) -> Subject:
        """Describe the service for a verdict, by its transcript so far."""
        return self.transcript.subject()

    @property
    def transcript(self) -> Transcript:
        """The record of all questions and answers so far."""
        return Transcript(
            type=TYPE,
            url=self.url,
            protocol=self.options.protocol,
            options=self.options.public(),
            started=self._started,
            entries=tuple(self._entries),
        )

    def close(self) -> None:
        """Close the connection; closing twice is allowed."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.options.protocol}, asked={len(self._entries)})"

    def _within_budget(self, count: int) -> None:
        """Raise `ConfigError` if `count` more images exceed the budget."""
        if len(self._entries) + count > self.options.budget:
            raise ConfigError(
                f"expected at most {self.options.budget:,} images in all, came {count:,} after "
                f"{len(self._entries):,}: raise the budget or ask about fewer"
            )

    def _batches(self, images: Images) -> Iterator[Images]:
        """Yield the images in the batches that share one request."""
        size = self.options.images_a_request
        for start in range(0, len(images), size):
            yield images[start : start + size]

    def _ask(self, batch: Images) -> list[Entry]:
        """Send one request, unless the deadline has passed, and return an entry for each image."""
        if not self._pace.left():
            return self._entries_of(batch, None, self._late(Reply()), 0)
        body = PROTOCOLS[self.options.protocol].body(batch, self.options)
        reply, attempts = self._persist(body)
        return self._entries_of(batch, body if attempts else None, reply, attempts)

    def _persist(self, body: bytes) -> tuple[Reply, int]:
        """Send a request until an answer comes that needs no repetition, or no attempt is left.

        Returns: the last reply, and the number of attempts.
        """
        reply, pause = Reply(), 0.0
        for attempts in range(self.options.retries + 1):
            # Returns false at once if the pause would outlast the deadline.
            if not self._pace.turn(pause):
                return self._late(reply), attempts
            reply = self._wire.post(body, min(self.options.timeout, self._pace.left()))
            # An answer with an error that repeating cannot mend, such as 404, ends here as well.
            if not reply.again:
                return reply, attempts + 1
            pause = self._pace.after(attempts + 1, reply.wait)
        return reply, self.options.retries + 1

    def _late(self, reply: Reply) -> Reply:
        """Return a reply with the deadline as its reason, behind the reason so far."""
        over = f"the deadline of {self.options.deadline:g} s left no time to ask"
        return replace(reply, why=f"{reply.why}; {over} again" if reply.why else over)

    def _entries_of(
        self, batch: Images, body: bytes | None, reply: Reply, attempts: int
    ) -> list[Entry]:
        """Make the transcript's entries of one batch.

        Args:
            batch: the images.
            body: body of the request; None if it was never sent.
            reply: the last reply.
            attempts: requests that were sent.
        """
        return [
            Entry(
                image=image_digest(image),
                # Digests instead of bodies keep a transcript small, and still prove what was sent.
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
        """Parse the labels of `count` images out of a reply."""
        if reply.why is not None or reply.body is None:
            return [unread(reply.why or "no answer")] * count
        return read_answer(reply.body, count, self.options)


def _sha256(content: bytes | None) -> str | None:
    """Return SHA-256 in hexadecimal, or None for None."""
    return None if content is None else hashlib.sha256(content).hexdigest()
