"""Remote suspects: prediction services as functions from images to labels.

    connect(url, RemoteOptions(protocol=…))  ->  Endpoint      the function; also a context manager
    endpoint(images)                         ->  labels        −1 where no label could be read
    endpoint.transcript                      ->  Transcript    record of all questions and answers
    Transcript.load(path)                    ->  Transcript    from a file; no network is needed

A suspect is hostile. Whatever it does costs labels but raises no error, and is in the transcript. A
transcript can answer again in the suspect's place. Connecting needs the extra `remote`; reading a
transcript does not.
"""

from countermark.predictors.base import Predictor
from countermark.predictors.remote.endpoint import Endpoint, connect
from countermark.predictors.remote.options import RemoteOptions
from countermark.predictors.remote.transcript import Transcript, TranscriptEntry

__all__ = ["Endpoint", "Predictor", "RemoteOptions", "Transcript", "TranscriptEntry", "connect"]
