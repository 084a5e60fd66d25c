"""What somebody asks for, and what became of it: one document a job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints

from countermark.claims.statement import Instant, instant
from countermark.errors import printable
from countermark.files import Hex32, Stored

State = Literal["waiting", "running", "done", "failed"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Alpha = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
UPLOAD = "upload"  # the suspect's file in its job's folder; its end is that of its name
ENDS = (".safetensors", ".onnx", ".pt", ".pth", ".bin")


class Chosen(Stored):
    """A suspect: a name on the server, or that of an upload."""

    name: Name
    uploaded: bool

    @property
    def file(self) -> str:
        """What an upload is called in its job's folder."""
        end = next((each for each in ENDS if self.name.lower().endswith(each)), "")
        return f"{UPLOAD}{end}"


class VerifyOrder(Stored):
    """Is the mark of this key in this suspect?

    Attributes:
        key: its name on the server.
        claim, suspect_date: a claim of the ledger, and the examiner's statement; both or neither.
    """

    kind: Literal["verify"] = "verify"
    suspect: Chosen
    key: Name
    alpha: Alpha = 1e-6
    assume_dated: bool = False
    blind_choice: bool = False
    claim: Hex32 | None = None
    suspect_date: Annotated[str, StringConstraints(max_length=40)] | None = None


class ResolveOrder(Stored):
    """Whose of two owners is this suspect? Names on the server, and claims of the ledger."""

    kind: Literal["resolve"] = "resolve"
    suspect: Chosen
    keys: tuple[Name, Name]
    claims: tuple[Hex32, Hex32]
    models: tuple[Name, Name]
    alpha: Alpha = 1e-6


Order: TypeAlias = Annotated[VerifyOrder | ResolveOrder, Field(discriminator="kind")]


class Job(Stored):
    """A job, as it lies in its folder.

    Attributes:
        id: of the job, and the name of its folder.
        order: what was asked.
        state: waiting, running, done or failed.
        made, ended: when.
        tries: how often it was started.
        outcome: what came out.
        error: why it failed, in one sentence.
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
        """Whether nothing will become of it any more."""
        return self.state in ("done", "failed")

    def started(self) -> Job:
        """The same, running."""
        return self.model_copy(update={"state": "running", "tries": self.tries + 1})

    def done(self, outcome: str) -> Job:
        """The same, done."""
        return self.model_copy(update={"state": "done", "ended": now(), "outcome": outcome})

    def failed(self, why: str) -> Job:
        """The same, failed."""
        told = {"state": "failed", "ended": now(), "error": printable(why, 600)}
        return self.model_copy(update=told)


def now() -> str:
    """This second."""
    return instant(datetime.now(UTC).replace(microsecond=0))
