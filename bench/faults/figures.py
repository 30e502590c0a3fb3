"""What a fault run has measured, and what it is judged by. Left out: how it is shown (`bench.faults.report`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.faults.check import Verdict

AGAIN_MAX_S: Final = 15.0
"""From a fault's end to the first acknowledgement, and to the first landing."""
DRAIN_LEAST: Final = 0.8
"""Of what a backlog is landed at in health."""
DRAIN_WORTH_S: Final = 1.0
"""A backlog that health lands sooner tells how long workers took to come back, not how fast they land."""


@dataclass(frozen=True)
class Reference:
    """The machine in health, in readings a second."""

    sustained: float | None
    """From a request to its rows, as fast as it goes; None where a rate was given."""
    rate: float
    """Of the load."""


@dataclass(frozen=True)
class Faulted:
    """One fault."""

    name: str
    verdict: Verdict
    first_acknowledged_s: float | None = None
    """After the fault's end; None: never."""
    first_landed_s: float | None = None
    drained_per_s: float | None = None
    """Readings a second; None where the fault left no backlog worth the name."""
    health_per_s: float | None = None
    """What a backlog is landed at just before the fault, by the same workers, the load going on."""
    recovered_s: float | None = None
    """From the fault's end until what lands is no more than a second behind what is acknowledged."""
    backlog: int = 0
    """Readings acknowledged and not landed when the fault ended."""
    spooled: int = 0
    """Readings that were acknowledged from a spool."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Attempts that were not answered as in health."""
    unexpected: Mapping[str, int] = field(default_factory=dict)
    """Answers that no fault excuses."""
    told: bool = True
    """Whether the logs named cause and remedy."""
    fails_nothing: bool = False
    breaks_broker: bool = False

    @property
    def harm(self) -> list[str]:
        """What breaks the promise, whatever the machine."""
        verdict = self.verdict
        found = [
            f"{number} {what}" for number, what in ((verdict.lost, "lost"), (verdict.doubled, "doubled")) if number
        ]
        found += verdict.wrong
        found += [f"{number} × {answer}" for answer, number in self.unexpected.items()]
        if self.fails_nothing:
            found += [f"{number} × {failure}" for failure, number in self.failures.items()]
        if not self.told:
            found.append("the logs do not tell")
        return found

    @property
    def broker(self) -> str:
        """What became of messages at a broker that broke; empty for a fault of anything else."""
        if not self.breaks_broker:
            return ""
        lost, again = self.verdict.lost_by_broker, self.verdict.repeated_by_broker
        return f"of what it had acknowledged, the broker lost {lost:,} readings, and {again:,} stand once more"

    @property
    def drained(self) -> float | None:
        """Of what a backlog is landed at in health; None where it was too small to tell."""
        if not self.drained_per_s or not self.health_per_s:
            return None
        is_worth = self.backlog >= DRAIN_WORTH_S * self.health_per_s
        return self.drained_per_s / self.health_per_s if is_worth else None

    @property
    def missed(self) -> list[str]:
        """The figures that this machine did not reach."""
        found = []
        for what, seconds in (
            ("acknowledgement", self.first_acknowledged_s),
            ("landing", self.first_landed_s),
        ):
            if seconds is None or seconds > AGAIN_MAX_S:
                found.append(f"first {what} > {AGAIN_MAX_S:g} s")
        if self.recovered_s is None:
            found.append("not recovered")
        if self.drained is not None and self.drained < DRAIN_LEAST:
            found.append(f"drained at < {DRAIN_LEAST:g} × landing")
        return found


@dataclass(frozen=True)
class Suite:
    """All faults of a run."""

    seconds: float
    hold: float
    reference: Reference
    faulted: Sequence[Faulted]

    @property
    def kept(self) -> bool:
        """Whether no fault did harm."""
        return not any(fault.harm for fault in self.faulted)
