"""How a device's id is spelt where its local id could stand as well. Left out: what each face calls it."""

import re
from typing import Final
from uuid import UUID

_HEX: Final = "[0-9a-fA-F]"
#: A UUID, or its 32 digits, with or without the prefix.
DEVICE_ID: Final = f"(?:dev_)?(?:{_HEX}{{32}}|{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}})"
_DEVICE_ID: Final = re.compile(DEVICE_ID)


def device_id_of(name: str) -> UUID | None:
    """The device that is meant by its id; None for what can only be a local id."""
    return UUID(name.removeprefix("dev_")) if _DEVICE_ID.fullmatch(name) else None
