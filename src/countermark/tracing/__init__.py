"""Another mark for each recipient, and which of them a copy comes from.

    tardos      biased code words, symmetric scores, and how probable an innocent's score is
    colluding   what recipients may do together, simulated on code words
    recipients  a key for many recipients, their copies of a checkpoint, and tracing

numpy; the marks are those of `stamping`.
"""

from __future__ import annotations

from countermark.tracing.recipients import Traced, issue, recipients_key, trace

__all__ = ["Traced", "issue", "recipients_key", "trace"]
