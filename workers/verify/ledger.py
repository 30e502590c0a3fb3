"""What was found against what the ledger says, row by row of it. Left out: finding it (`reading`, `matching`)."""

from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from workers.verify import tally
from workers.verify.tally import HOUR_US, Booked, Finding, Findings, Group, Tally
from workers.verify.times import as_text

_SET_ASIDE: Final = (tally.CONFLICTS, tally.QUARANTINED, tally.DISCARDED, tally.EXPIRED)


class Compared:
    """How many of the ledger's rows could be compared."""

    def __init__(self) -> None:
        self.hours = 0
        self.not_whole = 0
        """Whose records were not all read."""


def compare(totals: Tally, findings: Findings, is_whole: Callable[[Group], bool]) -> Compared:
    """Tell of every row that differs; `is_whole`: all records of its hour were read."""
    compared = Compared()
    for group, found, booked in totals.groups():
        if not is_whole(group):
            compared.not_whole += 1
            continue
        compared.hours += 1
        differences = differing(found, booked)
        if differences:
            findings.add(
                Finding(
                    kind="ledger",
                    message="; ".join(differences),
                    organisation_id=UUID(bytes=group.organisation),
                    time=as_text(group.hour * HOUR_US),
                    source=UUID(bytes=group.source),
                    partition=group.partition,
                )
            )
    return compared


def differing(found: Sequence[int], booked: Booked) -> list[str]:
    """Each difference in words. What is lost is told of by itself: nobody knows where it was counted."""
    differences = []
    if found[tally.RECEIVED] != booked.received:
        differences.append(f"received {booked.received} in the ledger, {found[tally.RECEIVED]} in the log")
    if booked.received != booked.stored + booked.duplicates + booked.conflicts + booked.quarantined:
        differences.append(
            f"received {booked.received} is not the sum of stored {booked.stored}, duplicates {booked.duplicates}, "
            f"conflicts {booked.conflicts} and quarantined {booked.quarantined}"
        )
    if found[tally.LOST]:
        return differences
    set_aside = sum(found[column] for column in _SET_ASIDE)
    if set_aside != booked.conflicts + booked.quarantined:
        differences.append(
            f"conflicts and quarantined {booked.conflicts + booked.quarantined} in the ledger, "
            f"{set_aside} in quarantine"
        )
    standing = found[tally.FOUND] + found[tally.RETIRED]
    if standing != booked.stored + booked.duplicates:
        differences.append(
            f"stored and duplicates {booked.stored + booked.duplicates} in the ledger, {standing} in the store"
        )
    if found[tally.TOLD] != booked.duplicates:
        differences.append(f"duplicates {booked.duplicates} in the ledger, {found[tally.TOLD]} in the outcomes")
    least = found[tally.REPEATED]
    most = least + found[tally.OPEN] + found[tally.RETIRED]
    if not least <= booked.duplicates <= most:
        meant = str(least) if least == most else f"{least} to {most}"
        differences.append(f"duplicates {booked.duplicates} in the ledger, {meant} by the records")
    return differences
