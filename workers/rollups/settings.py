"""Settings of the roll-ups."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class RollupsSettings:
    """How closely roll-ups follow what lands, and how much of it is done at once."""

    rollups_close_s: float = setting(
        10.0, unit="s", least=0.05, why="How often it is looked how far readings have landed; a bucket has 300 s."
    )
    rollups_repair_s: float = setting(
        5.0, unit="s", least=0.05, most=30, why="How often marks are looked for: late data is to be repaired in 60 s."
    )
    rollups_delay_s: float = setting(
        60.0,
        unit="s",
        least=0,
        why="How long a bucket stays open for readings that were on their way: fewer come late and need a repair.",
    )
    rollups_settle_s: float = setting(
        10.0,
        unit="s",
        least=0,
        most=300,
        why="How long a pass waits for transactions older than the closing; the next one goes on waiting.",
    )
    rollups_step_s: float = setting(
        1.0,
        unit="s",
        least=0.01,
        most=20,
        why="What one transaction should take: longer spans and more marks go into quick ones, fewer into slow ones.",
    )
    rollups_share: float = setting(
        0.5,
        least=0.05,
        most=1,
        why="Part of the time in which roll-ups are computed; they rest for the others: landing comes first.",
    )

    def rest_s(self, worked_s: float) -> float:
        """How long to rest after so much work, in seconds."""
        return worked_s * (1 / self.rollups_share - 1)
