"""What the research journal says about a trial of an overlay, before it and after."""

from __future__ import annotations

from evolution.uroboros import FUTILE, MAX_REPLICATES, Candidate, SearchSettings, Verdict
from research.journal import Journal, Outcome, Registration


class TrialJournal:
    """Entries of candidates in a research journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    @property
    def position(self) -> int:
        """What a checkpoint stores."""
        return self._journal.position

    def resume(self, position: int) -> None:
        """Go on behind a checkpoint's `position`; later entries become orphans."""
        self._journal.resume(position)

    def register(
        self,
        found: Candidate,
        settings: SearchSettings,
        *,
        step: int,
        steps: int,
        interval: int,
        batches: int,
        placebo: bool,
    ) -> int:
        """Write down what is tried and what will decide, before the first arm; the cycle.

        OSError where that cannot be written.
        """
        proposal, own = found.proposal, settings
        gain = f" and a relative gain of at least {own.min_gain:g}" if own.gain_enforced else ""
        strict = ", without more gradient spikes than the control" if own.strict else ""
        note = " Placebo: the candidate changes nothing, its numbers are random." if placebo else ""
        entry = Registration(
            step=step,
            title=f"candidate {found.number}: {proposal.new}",
            hypothesis=f"With {proposal.new} instead of {proposal.old}, the loss on held-out "
            f"training text falls further in {steps} steps ({proposal.reason}).",
            metric="Difference of the fall of the probe loss (nats per token) between two arms "
            "from one state over the same batches; positive = the candidate is better.",
            threshold=f"Promoted at evidence E >= {1.0 / found.alpha:.4g} (alpha "
            f"{found.alpha:.4g} of the run's {own.alpha:g}) with an effect size of at least "
            f"{own.min_effect:g}{gain}{strict}. Dropped below {FUTILE:g} or after "
            f"{MAX_REPLICATES} replicates.",
            design=f"Replicates begin at least {interval} steps apart; {batches} probe batches; "
            f"both arms use the same random numbers.{note}",
        )
        return self._journal.register(entry)

    def is_open(self, cycle: int) -> bool:
        """Whether the journal still waits for what came out of a cycle."""
        return self._journal.is_open(cycle)

    def complete(self, cycle: int, verdict: Verdict, *, step: int, decision: str) -> None:
        """Add what came out of it."""
        result = (
            f"{verdict.count} replicates: E = {verdict.e_value:.4g}, effect size "
            f"{verdict.effect:.3f}, relative gain {verdict.gain:.3f}."
        )
        self._journal.complete(
            cycle, Outcome(step=step, result=result, interval=verdict.interval, decision=decision)
        )

    def settle(self) -> None:
        """Write what waited for space on the disk."""
        self._journal.settle()
