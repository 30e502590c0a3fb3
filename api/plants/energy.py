"""What a plant produced, imported and exported today, from the counters it sends. Left out: reading them."""

from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from api.plants.shapes import Energy
from api.readings.aggregation import Question
from api.readings.functions import FUNCTIONS
from api.readings.questions import answer_of
from api.readings.series import Found, find_devices
from api.settings import ApiSettings

#: By the catalogue's names (`schemas.catalogue`), which are in Wh.
METRICS: Final = {
    "produced": "energy_produced",
    "imported": "energy_imported",
    "exported": "energy_exported",
}
_WH_PER_KWH: Final = 1_000
_DIGITS: Final = 6
_DAY: Final = timedelta(days=1)


async def energy_of_day(connection: Any, plant: UUID, now: datetime, settings: ApiSettings) -> Energy:
    """Of the day of UTC in which `now` lies, over all labels of each metric.

    A counter's rise from the last reading of the day before counts for the first of this one, and a drop means that
    it began again at 0. `selfConsumptionPct` is (produced - exported) / produced in per cent, from 0 to 100: what of
    the production stayed. Raises what `answer_of` raises.
    """
    start = now.replace(hour=0, minute=0, second=0, microsecond=0)
    found = (await find_devices(connection, [plant])).get(plant, Found({}))
    names = set(METRICS.values())
    found = Found({number: one for number, one in found.series.items() if one.metric in names})
    question = Question(start, start + _DAY, [start, start + _DAY], ("delta",))
    answer = await answer_of(connection, found, question, settings)
    sums = dict.fromkeys(names, 0.0)
    for number, parts in answer.series.items():
        for delta in FUNCTIONS["delta"].of(parts):
            sums[found.series[number].metric] += delta or 0.0
    told = {name: round(sums[metric] / _WH_PER_KWH, _DIGITS) for name, metric in METRICS.items()}
    return Energy(date=start.date().isoformat(), self_consumption_pct=_share(**told), **told)


def _share(*, produced: float, imported: float, exported: float) -> float | None:
    if produced <= 0:
        return None
    return round(min(max((produced - exported) / produced, 0.0), 1.0) * 100, 2)
