"""The contents of forms, as pages and programs send them."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, BinaryIO

from fastapi import Form, UploadFile
from pydantic import BaseModel, ConfigDict

from countermark.errors import ConfigError, make_printable
from countermark.web.orders import DisputeRequest, Job, VerifyRequest
from countermark.web.site import AppState, parse_request

# Characters of an upload's name that are kept.
_LONGEST = 120


class SessionForm(BaseModel):
    """A form of a session. Pages send `csrf`; programs, which send the token, leave it out."""

    model_config = ConfigDict(extra="forbid")

    csrf: str = ""


class LoginForm(SessionForm):
    """The token, and the page to show after the log-in."""

    token: str = ""
    next: str = "/"


class ClaimForm(SessionForm):
    """A signed claim as a file."""

    file: UploadFile


class SuspectForm(SessionForm):
    """A suspect: an upload, or the name of a file or folder on this server."""

    file: UploadFile | None = None
    suspect: str = ""
    alpha: float = 1e-6


class VerifyForm(SuspectForm):
    """A suspect, the name of a key on this server, and the examiner's statements."""

    key: str
    assume_dated: bool = False
    blind_choice: bool = False
    claim: str = ""
    suspect_date: str = ""

    def submit_to(self, site: AppState) -> Job:
        """Start the job that the form asks for and return it.

        Raises:
            CountermarkError: the form is wrong, or too many jobs wait.
        """
        chosen, upload = _choose_suspect(self)
        fields = {
            "suspect": chosen, "key": self.key, "alpha": self.alpha,
            "assume_dated": self.assume_dated, "blind_choice": self.blind_choice,
            "claim": self.claim.strip().lower() or None,
            "suspect_date": self.suspect_date.strip() or None,
        }  # fmt: skip
        return site.accept_request(parse_request(VerifyRequest, fields), upload)


class DisputeForm(SuspectForm):
    """A suspect and, for each of two parties, a key, a claim and a model of this server."""

    first_key: str
    first_claim: str
    first_model: str
    second_key: str
    second_claim: str
    second_model: str

    def submit_to(self, site: AppState) -> Job:
        """Start the job that the form asks for and return it.

        Raises:
            CountermarkError: the form is wrong, or too many jobs wait.
        """
        chosen, upload = _choose_suspect(self)
        claims = (self.first_claim, self.second_claim)
        fields = {
            "suspect": chosen, "alpha": self.alpha,
            "keys": (self.first_key, self.second_key),
            "claims": tuple(each.strip().lower() for each in claims),
            "models": (self.first_model, self.second_model),
        }  # fmt: skip
        return site.accept_request(parse_request(DisputeRequest, fields), upload)


def _choose_suspect(form: SuspectForm) -> tuple[dict[str, Any], BinaryIO | None]:
    """Return the suspect as a job's request names it, and the uploaded file if there is one.

    Raises:
        ConfigError: both an upload and a name are given, or neither, or the upload is empty.
    """
    # Browsers send a file field without a file as an empty file without a name.
    uploaded = form.file is not None and bool(form.file.filename)
    if uploaded == bool(form.suspect):
        raise ConfigError("one suspect is needed: upload a file, or choose one of this server")
    if form.file is None or not uploaded:
        return {"name": form.suspect, "uploaded": False}, None
    if not form.file.size:
        raise ConfigError("the file that was uploaded is empty: expected a weight file")
    return {"name": _clean_file_name(form.file.filename or ""), "uploaded": True}, form.file.file


def _clean_file_name(filename: str) -> str:
    """Return the printable name of an upload, without any path."""
    # Either kind of path may come, whatever system the server runs on.
    last = PurePosixPath(PureWindowsPath(filename).name).name
    return make_printable(last, _LONGEST) or "upload"


def make_multipart_marker() -> Any:
    """Return the FastAPI marker for a form that may hold a file."""
    return Form(media_type="multipart/form-data")


Login = Annotated[LoginForm, Form()]
Leaving = Annotated[SessionForm, Form()]
NewClaim = Annotated[ClaimForm, make_multipart_marker()]
Verify = Annotated[VerifyForm, make_multipart_marker()]
Resolve = Annotated[DisputeForm, make_multipart_marker()]
