"""What one message has been told and has cost so far, over all its calls and models.

Rules of this file: frozen values; texts stay out of every repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from service.core.events import Purpose
from service.core.messages import Provenance, TextCut
from service.llm.prices import Bill

Side = Literal["cut_head", "cut_tail"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Where the calls for one message stand; handed back at its next attempt.

    `whole` is the message's text, `text` what of it is sent. `step` counts the models that have
    given up, `said` tells what they came to. `tail` holds the answers of the present one that did
    not validate and what was said to them, as JSON that goes behind the text. `purpose` is the
    next call's.
    """

    spent: Provenance
    whole: str = field(repr=False)
    text: str = field(repr=False)
    purpose: Purpose = "first"
    tail: bytes = field(default=b"", repr=False)
    reasks: int = 0
    longer: bool = False  # the answer may take twice the tokens
    cuts: int = 0
    step: int = 0
    said: tuple[str, ...] = field(default=(), repr=False)
    refused_s: float | None = None
    """When the present step refused it without a reason that is known (monotonic seconds)."""

    def paid(self, bill: Bill) -> Conversation:
        """One call more, and what it cost."""
        tokens = bill.tokens
        spent = self.spent.and_one_call(
            tokens_input=tokens.input,
            tokens_output=tokens.output,
            tokens_cached=tokens.cached,
            tokens_reasoning=tokens.reasoning,
            cost_usd=bill.cost_usd,
        )
        return replace(self, spent=spent)

    def shortened(self, side: Side, kept_max_bytes: int) -> Conversation:
        """With at most so many bytes of the text, cut between characters."""
        whole = self.whole.encode()
        kept = whole[-kept_max_bytes:] if side == "cut_head" else whole[:kept_max_bytes]
        text = kept.decode(errors="ignore")
        cut = TextCut(len(text.encode()), len(whole))
        return replace(self, text=text, spent=replace(self.spent, text_cut=cut))
