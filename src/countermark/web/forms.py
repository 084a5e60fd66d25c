"""What forms bring, for pages and programs alike."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, BinaryIO

from fastapi import Form, UploadFile
from pydantic import BaseModel, ConfigDict

from countermark.errors import ConfigError, printable
from countermark.web.orders import Job, ResolveOrder, VerifyOrder
from countermark.web.site import Site, order_of

_LONGEST = 120  # characters of the name of an upload that are kept


class OwnForm(BaseModel):
    """A form of a session; programs leave `csrf` out."""

    model_config = ConfigDict(extra="forbid")

    csrf: str = ""


class LoginForm(OwnForm):
    """The token, and the page to go on to."""

    token: str = ""
    next: str = "/"


class ClaimForm(OwnForm):
    """A signed claim, as a file."""

    file: UploadFile


class SuspectForm(OwnForm):
    """A suspect: an upload, or a name on this server."""

    file: UploadFile | None = None
    suspect: str = ""
    alpha: float = 1e-6


class VerifyForm(SuspectForm):
    """A suspect, a key by its name on this server, and what is stated."""

    key: str
    assume_dated: bool = False
    blind_choice: bool = False
    claim: str = ""
    suspect_date: str = ""

    def sent_to(self, site: Site) -> Job:
        """The job that this asks for.

        Raises:
            CountermarkError: it cannot be asked for.
        """
        chosen, upload = _suspect(self)
        fields = {
            "suspect": chosen, "key": self.key, "alpha": self.alpha,
            "assume_dated": self.assume_dated, "blind_choice": self.blind_choice,
            "claim": self.claim.strip().lower() or None,
            "suspect_date": self.suspect_date.strip() or None,
        }  # fmt: skip
        return site.take(order_of(VerifyOrder, fields), upload)


class ResolveForm(SuspectForm):
    """A suspect, and what two parties show: keys, claims and models, all of this server."""

    first_key: str
    first_claim: str
    first_model: str
    second_key: str
    second_claim: str
    second_model: str

    def sent_to(self, site: Site) -> Job:
        """The job that this asks for.

        Raises:
            CountermarkError: it cannot be asked for.
        """
        chosen, upload = _suspect(self)
        claims = (self.first_claim, self.second_claim)
        fields = {
            "suspect": chosen, "alpha": self.alpha,
            "keys": (self.first_key, self.second_key),
            "claims": tuple(each.strip().lower() for each in claims),
            "models": (self.first_model, self.second_model),
        }  # fmt: skip
        return site.take(order_of(ResolveOrder, fields), upload)


def _suspect(form: SuspectForm) -> tuple[dict[str, Any], BinaryIO | None]:
    """A suspect as an order names it, and what was uploaded."""
    uploaded = form.file is not None and bool(form.file.filename)
    if uploaded == bool(form.suspect):
        raise ConfigError("one suspect is needed: upload a file, or choose one of this server")
    if form.file is None or not uploaded:
        return {"name": form.suspect, "uploaded": False}, None
    if not form.file.size:
        raise ConfigError("the file that was uploaded is empty: expected a weight file")
    return {"name": _name(form.file.filename or ""), "uploaded": True}, form.file.file


def _name(filename: str) -> str:
    """What an upload is called: no path, nothing that does not print."""
    last = PurePosixPath(PureWindowsPath(filename).name).name
    return printable(last, _LONGEST) or "upload"


def multipart() -> Any:
    """Where a form with a file is read from."""
    return Form(media_type="multipart/form-data")


Login = Annotated[LoginForm, Form()]
Leaving = Annotated[OwnForm, Form()]
NewClaim = Annotated[ClaimForm, multipart()]
Verify = Annotated[VerifyForm, multipart()]
Resolve = Annotated[ResolveForm, multipart()]
