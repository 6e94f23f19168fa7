"""Every error of ours, by what the caller does about it.

    SluiceError
    ├── Retry                 wait, then try the same thing again
    │   ├── TransientFailure    a call: connection, timeout, 408, 409, 425, 429, 5xx, overloaded
    │   ├── ServiceFailure      a call: no call can succeed until somebody mends something
    │   │   └── Unclear           a refusal that does not say which of the two it is
    │   ├── NoRoom              a further call of a message: the budgets have no room for it now
    │   ├── PublishFailed       a send: not acknowledged, or not known to be
    │   └── CommitFailed        a commit: refused (a rebalance) or not answered in time
    ├── Reject                this message only; the next one is fine
    │   └── OutputTooLarge      the output topic does not take a value of this size
    └── Stop                  the process ends, with a sentence for a person
        ├── WrongSettings       exit code 2
        └── CannotRun           exit code 1
            └── NotReachable      another system is down; the caller waits if it can

A message that fails for good is not an error but an outcome: `Rejected`. The texts of errors may
be logged, so they never hold a message's text or a model's answer.
"""

from service.core.admission.retry import asked_to_wait_s
from service.core.messages import Provenance

FAILED, WRONG, ALL_REJECTED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: something failed, or `--until-caught-up` ended without catching up; the settings are
wrong; it caught up and every message was rejected; Ctrl-C ended it. 0 is done."""


class SluiceError(Exception):
    """Root of everything that this project raises on purpose."""


class Retry(SluiceError):
    """Wait, then try the same thing again."""


class CallFailure(Retry):
    """A call that failed for a reason that lies outside the message.

    `reason` is a short word for logs and a metric's label. `retry_after_s` is how long the provider
    asked us to wait, capped by `asked_to_wait_s`; None where it asked for nothing. `progress` is
    what the extractor wants to get back at the next attempt (answers already paid for).
    `provenance` says what was spent so far. `shared` is true where several messages waited for one
    call and another of them has reported its failure: it must not count a second time.
    """

    shared = False
    route: str | None = None
    """The route on which the call failed; None: the route on which the attempt began."""

    def __init__(
        self,
        reason: str,
        *,
        retry_after_s: float | None = None,
        progress: object | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = asked_to_wait_s(retry_after_s)
        self.progress = progress
        self.provenance = provenance


class TransientFailure(CallFailure):
    """Another attempt may succeed by itself."""


class ServiceFailure(CallFailure):
    """No call can succeed until somebody mends something (401, 403, unknown model, quota)."""

    def __init__(
        self,
        reason: str,
        *,
        remedy: str,
        progress: object | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__(reason, progress=progress, provenance=provenance)
        self.remedy = remedy


class Unclear(ServiceFailure):
    """A refusal that does not say whether every call fails (a setting, a right) or only this one.

    It counts as a failure of the service until the route has answered other messages and then
    refused this message again (see `service/llm/evidence.py`).
    """


class NoRoom(CallFailure):
    """Nothing failed: the next call of this message has to wait for its turn without a slot."""

    def __init__(self, *, progress: object | None, provenance: Provenance | None) -> None:
        super().__init__("budget", progress=progress, provenance=provenance)


class PublishFailed(Retry):
    """A send was not acknowledged, or it is not known whether it was."""


class CommitFailed(Retry):
    """A commit was refused or not answered in time; a later commit stores what it held."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reject(SluiceError):
    """A failure that concerns one message only."""


class OutputTooLarge(Reject):
    """The output topic (or the producer's request size) does not take a value of this size."""


class Stop(SluiceError):
    """Ends the process; the text is a sentence for a person: what, where, what to do."""


class WrongSettings(Stop):
    """The settings cannot work; exit code 2."""


class CannotRun(Stop):
    """The settings may be right but the world is not ready for them; exit code 1."""


class NotReachable(CannotRun):
    """Something that we need does not answer now, and may do so later by itself."""
