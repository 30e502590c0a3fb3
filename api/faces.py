"""Which faces there are. A path is the face's with the longest fitting prefix; the platform has all others."""

from typing import Final

from api.http.faces import DETAILED, ENVELOPE, PROBLEM, Face

SITES: Final = Face("sites", "Sites", ("/api/organisations",), DETAILED)
DEVICES: Final = Face("devices", "Devices", ("/v1",), ENVELOPE)
PLATFORM: Final = Face("platform", "Platform", ("/api",), PROBLEM)

FACES: Final = (SITES, DEVICES, PLATFORM)
