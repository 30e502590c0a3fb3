"""What was found against what the ledger says, row by row of it. Left out: finding it (`reading`, `matching`).

What left the quarantine moves while the log is read: it is compared in the first snapshot, as the books stood then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from workers.verify import tally
from workers.verify.tally import HOUR_US, Booked, Finding, Findings, Group, SetAside, Tally
from workers.verify.times import as_text


@dataclass
class Compared:
    """How many of the ledger's rows could be compared."""

    hours: int = 0
    not_whole: int = 0
    """Whose records were not all read."""
    set_aside: int = 0
    """Those with readings set aside, compared with the quarantine."""
    forgotten: int = 0
    """Readings that left the quarantine so long ago that their rows are gone."""


def compare_set_aside(group: Group, found: SetAside, findings: Findings, compared: Compared) -> None:
    """Tell of it if the quarantine differs from what the ledger says of it."""
    compared.set_aside += 1
    differences = differing_set_aside(found)
    _tell(group, differences, findings)
    compared.forgotten += 0 if differences else found.gone


def differing_set_aside(found: SetAside) -> list[str]:
    """Each difference in words. A row that is forgotten had left, in whichever way."""
    differences = []
    inside = found.booked - found.replayed - found.discarded - found.expired
    if inside != found.held:
        differences.append(f"{inside} still in quarantine by the ledger, {found.held} in quarantine")
    for what, booked, standing in (
        ("replayed", found.replayed, found.rows_released),
        ("discarded", found.discarded, found.rows_discarded),
        ("expired", found.expired, found.rows_expired),
    ):
        if booked < standing or booked > standing + max(0, found.gone):
            differences.append(f"{what} {booked} in the ledger, {standing} in quarantine")
    if found.lost:
        differences.append(f"lost {found.lost} in the ledger, where nothing is counted yet")
    return differences


def compare(totals: Tally, findings: Findings, compared: Compared, is_whole: Callable[[Group], bool]) -> None:
    """Tell of every row that differs; `is_whole`: all records of its hour were read."""
    for group, found, booked in totals.groups():
        if not is_whole(group):
            compared.not_whole += 1
            continue
        compared.hours += 1
        _tell(group, differing(found, booked), findings)


def _tell(group: Group, differences: list[str], findings: Findings) -> None:
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


def differing(found: Sequence[int], booked: Booked) -> list[str]:
    """Each difference in words. What is lost is told of by itself: nobody knows where it was counted.

    What has tombstones on it may have been stored, set aside or dropped before: it is counted somewhere.
    """
    differences = []
    erased = found[tally.ERASED]
    if found[tally.RECEIVED] != booked.received:
        differences.append(f"received {booked.received} in the ledger, {found[tally.RECEIVED]} in the log")
    if booked.received != sum(booked[1:]):
        differences.append(
            f"received {booked.received} is not the sum of stored {booked.stored}, duplicates {booked.duplicates}, "
            f"conflicts {booked.conflicts}, quarantined {booked.quarantined} and erased {booked.erased}"
        )
    if booked.erased > erased:
        differences.append(f"erased {booked.erased} in the ledger, {erased} with tombstones on them")
    if abs(found[tally.TOLD_CONFLICTS] - booked.conflicts) > erased:
        differences.append(
            f"conflicts {booked.conflicts} in the ledger, {found[tally.TOLD_CONFLICTS]} in the outcomes"
        )
    if found[tally.LOST]:
        return differences
    standing = found[tally.FOUND] + found[tally.RETIRED]
    if not standing <= booked.stored + booked.duplicates <= standing + erased:
        differences.append(
            f"stored and duplicates {booked.stored + booked.duplicates} in the ledger, {standing} in the store"
        )
    if found[tally.TOLD] != booked.duplicates:
        differences.append(f"duplicates {booked.duplicates} in the ledger, {found[tally.TOLD]} in the outcomes")
    least = found[tally.REPEATED]
    most = least + found[tally.OPEN] + found[tally.RETIRED] + erased
    if not least <= booked.duplicates <= most:
        meant = str(least) if least == most else f"{least} to {most}"
        differences.append(f"duplicates {booked.duplicates} in the ledger, {meant} by the records")
    return differences
