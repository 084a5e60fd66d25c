"""The JSON API for programs; `/api/openapi.json` describes it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from countermark.claims.ledger import InclusionProof
from countermark.claims.signed import LARGEST, Claim
from countermark.web.claims import ClaimList, TimestampInfo, check_claim
from countermark.web.forms import NewClaim, Resolve, Verify
from countermark.web.orders import Job
from countermark.web.site import AppState, Here

# The gate has checked the token already. This dependency only states in the OpenAPI document that
# a token is needed.
_TOKEN = Depends(HTTPBearer(auto_error=False, description="The token of this server."))
api = APIRouter(prefix="/api", dependencies=[_TOKEN])
# A place in the ledger; the bound keeps it within the integers of every database.
Before = Annotated[int | None, Query(ge=0, le=1 << 40)]
Words = Annotated[str, Query(max_length=200, description="A part of an owner's name, or a digest.")]
_REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"description": "It cannot be asked for; `detail` says why."},
    401: {"description": "The token is missing or wrong."},
    413: {"description": "More bytes than are taken."},
    429: {"description": "Too many requests, or too many jobs wait."},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": "There is none."}}


class LedgerHead(BaseModel):
    """The ledger as it is now: its identity, the number of claims, and the root over them."""

    ledger: str
    size: int
    root: str


class AvailableNames(BaseModel):
    """The keys and suspects that may be chosen by name."""

    keys: list[str]
    suspects: list[str]


class AddedClaim(BaseModel):
    """A claim that the ledger has stored on disk, and its place."""

    digest: str
    place: int


class ClaimAnswer(BaseModel):
    """A claim that was checked for this answer.

    Attributes:
        claim: the document.
        holds: whether all signatures, timestamps and the inclusion proof are valid.
        signature: why the signatures are invalid; null if they are valid.
        stamps: the timestamps: when, by whom, and whether this server trusts the authority.
        proof: the proof that the claim is in the ledger's tree.
        included: whether the proof leads to the root.
    """

    claim: dict[str, Any]
    holds: bool
    signature: str | None
    stamps: list[TimestampInfo]
    proof: InclusionProof
    included: bool


class JobAnswer(BaseModel):
    """A job, its current step, and its answer: a verdict, or the decision of a dispute."""

    job: Job
    step: str
    answer: dict[str, Any] | None


@api.get("/head", responses=_REFUSED)
def get_head(site: Here) -> LedgerHead:
    """Return the ledger's size and root."""
    found = site.ledger.make_head()
    return LedgerHead(ledger=site.ledger.identity, size=found.size, root=found.root)


@api.get("/claims", responses=_REFUSED)
def list_claims(site: Here, q: Words = "", before: Before = None) -> ClaimList:
    """List claims, the newest first, 25 at a time."""
    return site.catalogue.find_claims(q, before)


@api.post("/claims", status_code=201, responses=_REFUSED)
def add_claim(site: Here, form: NewClaim) -> AddedClaim:
    """Add a signed claim and answer when it is on disk. A claim added twice keeps its place."""
    # One byte more than a claim may have: the parser then refuses the file as too large.
    claim = Claim.from_bytes(form.file.file.read(LARGEST + 1), "the file")
    return AddedClaim(digest=claim.digest, place=site.ledger.add(claim))


@api.get("/claims/{digest}", responses=_REFUSED | _UNKNOWN)
def get_claim(site: Here, digest: str) -> ClaimAnswer:
    """Return one claim, checked for this request."""
    # 64 is the length of a digest; a longer text would only come back in the error message.
    found = check_claim(site.ledger, digest[:64], site.authorities)
    return ClaimAnswer(
        claim=found.claim.model_dump(), holds=found.holds, signature=found.signature,
        stamps=list(found.stamps), proof=found.proof, included=found.included,
    )  # fmt: skip


@api.get("/names", responses=_REFUSED)
def list_names(site: Here) -> AvailableNames:
    """List the names of the keys and suspects of this server."""
    settings = site.settings
    return AvailableNames(
        keys=list(settings.key_choices.list_entries()), suspects=list(settings.suspect_choices.list_entries())
    )  # fmt: skip


@api.post("/verify", status_code=202, responses=_REFUSED)
def start_verification(site: Here, form: Verify) -> JobAnswer:
    """Start a job that reads a suspect with a key."""
    return _make_job_answer(site, form.submit_to(site))


@api.post("/resolve", status_code=202, responses=_REFUSED)
def start_dispute(site: Here, form: Resolve) -> JobAnswer:
    """Start a job that decides a dispute between two parties."""
    return _make_job_answer(site, form.submit_to(site))


@api.get("/jobs", responses=_REFUSED)
def list_jobs(site: Here) -> list[Job]:
    """List all jobs, the newest first."""
    return site.runner.list_jobs()


@api.get("/jobs/{identity}", responses=_REFUSED | _UNKNOWN)
def get_job(site: Here, identity: str) -> JobAnswer:
    """Return a job and its answer."""
    found = site.runner.find_job(identity)
    if found is None:
        raise HTTPException(404, "there is no such job")
    return _make_job_answer(site, found)


def _make_job_answer(site: AppState, job: Job) -> JobAnswer:
    """Return a job as the API answers it; there is no answer before the job is done."""
    answer = site.runner.read_answer(job) if job.state == "done" else None
    return JobAnswer(job=job, step=site.runner.describe_step(job), answer=answer)
