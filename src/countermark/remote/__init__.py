"""Suspects that can only be asked: prediction endpoints as functions from images to labels.

    connect(url, RemoteOptions(protocol=…))  ->  Endpoint      a Predict; also a context manager
    endpoint(images)                         ->  labels        −1 where there was none to be read
    endpoint.transcript                      ->  Transcript    what was asked and answered
    Transcript.load(path).predict()          ->  a Predict out of the record, without network

A suspect is hostile: whatever it does costs labels, never an exception, and is in the transcript.
`connect` needs the extra `remote`; a transcript is read without it.
"""

from countermark.answers import Predict
from countermark.remote.endpoint import Endpoint, connect
from countermark.remote.options import RemoteOptions
from countermark.remote.transcript import Entry, Transcript

__all__ = ["Endpoint", "Entry", "Predict", "RemoteOptions", "Transcript", "connect"]
