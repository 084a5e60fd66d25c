"""A separate mark for each recipient of a checkpoint, and tracing of a copy to its recipient.

    tardos      biased code words, symmetric scores, and the probability of an innocent's score
    colluding   attacks of several recipients together, simulated on code words
    recipients  a key for many recipients, their copies of a checkpoint, and tracing

These modules need numpy only; the marks are those of `stamping`.
"""

from __future__ import annotations

from countermark.recipients.copies import TraceResult, issue_copy, make_recipients_key, trace

__all__ = ["TraceResult", "issue_copy", "make_recipients_key", "trace"]
