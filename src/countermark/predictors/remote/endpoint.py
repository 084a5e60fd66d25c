"""A remote suspect as a function from images to labels, with a record of all requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Self

import numpy as np

from countermark._internal.progress import show_progress
from countermark.errors import ConfigError, MissingExtraError
from countermark.predictors.base import Images, Labels
from countermark.predictors.remote.address import complete_url, redact_url
from countermark.predictors.remote.answers import ParsedLabel, make_missing_label, read_answer
from countermark.predictors.remote.headers import read_secret_headers
from countermark.predictors.remote.images import NO_LABEL, check_sendable, digest_image
from countermark.predictors.remote.options import RemoteOptions
from countermark.predictors.remote.pace import RequestPacer
from countermark.predictors.remote.protocols import PROTOCOLS, choose_content_type
from countermark.predictors.remote.transcript import TYPE, Transcript, TranscriptEntry
from countermark.predictors.remote.wire import HttpConnection, HttpReply
from countermark.results.subject import Subject


def connect(url: str, options: RemoteOptions) -> Endpoint:
    """Prepare to ask a remote suspect; nothing is sent before the first image.

    Args:
        url: http(s), of the server or of the model; a query is sent but never recorded.
        options: protocol, form of images and answers, limits.

    Raises:
        ConfigError: the url, or the file that COUNTERMARK_HEADERS_FILE names, cannot be used.
        MissingExtraError: the extra `remote` is not installed.
    """
    complete = complete_url(url, options)
    # A user may replace Accept, but not the content type, which has to fit the body.
    headers = {"accept": "application/json"} | read_secret_headers()
    _require_extra(options)
    wire = HttpConnection(
        complete, headers | {"content-type": choose_content_type(options)}, options.largest_answer
    )
    # The endpoint knows the url only without its query, so no record can hold a token.
    return Endpoint(redact_url(complete), options, wire)


def _require_extra(options: RemoteOptions) -> None:
    """Raise `MissingExtraError` unless the packages that these options need are installed."""
    try:
        import httpx2  # noqa: F401 (only whether it is there)

        if options.needs_image_files:
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

    def __init__(self, url: str, options: RemoteOptions, wire: HttpConnection) -> None:
        self.url, self.options = url, options
        self._wire, self._pace = wire, RequestPacer(options)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._entries: list[TranscriptEntry] = []

    def __call__(self, images: Images) -> Labels:
        """Ask for the labels int64 (n,) of images uint8 (n, C, H, W).

        Whatever the suspect does, no error is raised. An image without a readable label gets −1,
        and the transcript holds the reason.

        Raises:
            ConfigError: the images cannot be sent as the options say, or would exceed the budget.
        """
        images = check_sendable(images, self.options)
        # Checked for all images before the first is sent: a service may charge for each request.
        self._require_budget(len(images))
        already = len(self._entries)
        with self._pace.count_time(), show_progress("asking the suspect", len(images)) as advance:
            for batch in self._split_batches(images):
                # Recorded batch by batch, so that Ctrl-C keeps the answers that were paid for.
                self._entries += self._ask_batch(batch)
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
            options=self.options.to_public_json(),
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

    def _require_budget(self, count: int) -> None:
        """Raise `ConfigError` if `count` more images exceed the budget."""
        if len(self._entries) + count > self.options.budget:
            raise ConfigError(
                f"expected at most {self.options.budget:,} images in all, came {count:,} after "
                f"{len(self._entries):,}: raise the budget or ask about fewer"
            )

    def _split_batches(self, images: Images) -> Iterator[Images]:
        """Yield the images in the batches that share one request."""
        size = self.options.images_per_request
        for start in range(0, len(images), size):
            yield images[start : start + size]

    def _ask_batch(self, batch: Images) -> list[TranscriptEntry]:
        """Send one request, unless the deadline has passed, and return an entry for each image."""
        if not self._pace.compute_time_left():
            return self._make_entries(batch, None, self._add_deadline_reason(HttpReply()), 0)
        body = PROTOCOLS[self.options.protocol].body(batch, self.options)
        reply, attempts = self._post_with_retries(body)
        return self._make_entries(batch, body if attempts else None, reply, attempts)

    def _post_with_retries(self, body: bytes) -> tuple[HttpReply, int]:
        """Send a request until an answer comes that needs no repetition, or no attempt is left.

        Returns: the last reply, and the number of attempts.
        """
        reply, pause = HttpReply(), 0.0
        for attempts in range(self.options.retries + 1):
            # Returns false at once if the pause would outlast the deadline.
            if not self._pace.wait_for_turn(pause):
                return self._add_deadline_reason(reply), attempts
            reply = self._wire.post(body, min(self.options.timeout, self._pace.compute_time_left()))
            # An answer with an error that repeating cannot mend, such as 404, ends here as well.
            if not reply.again:
                return reply, attempts + 1
            pause = self._pace.compute_pause(attempts + 1, reply.wait)
        return reply, self.options.retries + 1

    def _add_deadline_reason(self, reply: HttpReply) -> HttpReply:
        """Return a reply with the deadline as its reason, behind the reason so far."""
        over = f"the deadline of {self.options.deadline:g} s left no time to ask"
        return replace(reply, why=f"{reply.why}; {over} again" if reply.why else over)

    def _make_entries(
        self, batch: Images, body: bytes | None, reply: HttpReply, attempts: int
    ) -> list[TranscriptEntry]:
        """Make the transcript's entries of one batch.

        Args:
            batch: the images.
            body: body of the request; None if it was never sent.
            reply: the last reply.
            attempts: requests that were sent.
        """
        return [
            TranscriptEntry(
                image=digest_image(image),
                # Digests instead of bodies keep a transcript small, and still prove what was sent.
                request=_digest_content(body),
                answer=_digest_content(reply.body),
                status=reply.status,
                attempts=attempts,
                label=reading.label,
                why=reading.why,
            )
            for image, reading in zip(batch, self._parse_labels(reply, len(batch)), strict=True)
        ]

    def _parse_labels(self, reply: HttpReply, count: int) -> list[ParsedLabel]:
        """Parse the labels of `count` images out of a reply."""
        if reply.why is not None or reply.body is None:
            return [make_missing_label(reply.why or "no answer")] * count
        return read_answer(reply.body, count, self.options)


def _digest_content(content: bytes | None) -> str | None:
    """Return SHA-256 in hexadecimal, or None for None."""
    return None if content is None else hashlib.sha256(content).hexdigest()
