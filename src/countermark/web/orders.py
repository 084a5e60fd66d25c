"""Jobs and their requests, as stored documents: one document for each job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints

from countermark._internal.files import Hex32, StoredDocument
from countermark.claims.statement import Instant, format_time
from countermark.errors import make_printable

State = Literal["waiting", "running", "done", "failed"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Alpha = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
# The name of an uploaded suspect in its job's folder, without its ending.
UPLOAD = "upload"
# The reader of a weight file depends on the ending, so an upload keeps its own if it is known.
ENDS = (".safetensors", ".onnx", ".pt", ".pt2", ".pth", ".bin", ".ckpt")


class ChosenSuspect(StoredDocument):
    """A suspect that a visitor chose: the name of a file on the server, or of an upload."""

    name: Name
    uploaded: bool

    @property
    def upload_name(self) -> str:
        """The name of an upload's file in its job's folder."""
        end = next((each for each in ENDS if self.name.lower().endswith(each)), "")
        return f"{UPLOAD}{end}"


class VerifyRequest(StoredDocument):
    """A request to read a suspect with a key.

    Attributes:
        suspect: the suspect.
        key: the key's name on the server.
        alpha: the threshold for the chance of a false accusation.
        assume_dated, blind_choice: statements of the examiner.
        claim, suspect_date: the digest of a claim in the ledger, and the examiner's statement of
            the suspect's date; both or neither.
    """

    kind: Literal["verify"] = "verify"
    suspect: ChosenSuspect
    key: Name
    alpha: Alpha = 1e-6
    assume_dated: bool = False
    blind_choice: bool = False
    claim: Hex32 | None = None
    suspect_date: Annotated[str, StringConstraints(max_length=40)] | None = None


class DisputeRequest(StoredDocument):
    """A request to decide between two owners of a suspect.

    Attributes:
        suspect: the suspect.
        keys, models: names on the server, for the first and the second party.
        claims: the digests of their claims in the ledger.
        alpha: the threshold for the chance of a false accusation, over all readings.
    """

    kind: Literal["resolve"] = "resolve"
    suspect: ChosenSuspect
    keys: tuple[Name, Name]
    claims: tuple[Hex32, Hex32]
    models: tuple[Name, Name]
    alpha: Alpha = 1e-6


Order: TypeAlias = Annotated[VerifyRequest | DisputeRequest, Field(discriminator="kind")]


class Job(StoredDocument):
    """A job as it is stored in its folder. Changes of state return a copy.

    Attributes:
        id: the job's identity, and the name of its folder.
        order: the request.
        state: waiting, running, done or failed.
        made, ended: the instants of its creation and its end.
        tries: how often the job was started.
        outcome: the outcome of its verdict or its dispute.
        error: why the job failed, in one sentence.
    """

    type: Literal["countermark/job/v1"] = "countermark/job/v1"
    id: Identity
    order: Order
    state: State = "waiting"
    made: Instant
    ended: Instant | None = None
    tries: int = 0
    outcome: str | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        """Whether the job has ended, done or failed."""
        return self.state in ("done", "failed")

    def copy_as_running(self) -> Job:
        """Return a copy in the state running, with one more try."""
        return self.model_copy(update={"state": "running", "tries": self.tries + 1})

    def copy_as_done(self, outcome: str) -> Job:
        """Return a copy in the state done."""
        return self.model_copy(
            update={"state": "done", "ended": get_present_instant(), "outcome": outcome}
        )

    def copy_as_failed(self, why: str) -> Job:
        """Return a copy in the state failed.

        Args:
            why: one sentence; it is cut after 600 characters.
        """
        # The reason may quote a hostile file, so it is made printable before it is stored.
        told = {
            "state": "failed",
            "ended": get_present_instant(),
            "error": make_printable(why, 600),
        }
        return self.model_copy(update=told)


def get_present_instant() -> str:
    """Return the present instant in UTC, to the second."""
    return format_time(datetime.now(UTC).replace(microsecond=0))
