"""Which faces there are. A path is the face's with the longest fitting prefix; the platform has all others."""

from typing import Final

from api.http.faces import DETAILED, ENVELOPE, PROBLEM, STATUSED, Face
from api.plants.codes import CODES

SITES: Final = Face("sites", "Sites", ("/api/organisations",), DETAILED)
DEVICES: Final = Face("devices", "Devices", ("/v1",), ENVELOPE)
PLANTS: Final = Face("plants", "Plants", ("/api/v1/plants",), STATUSED, CODES)
PLATFORM: Final = Face("platform", "Platform", ("/api",), PROBLEM)

FACES: Final = (SITES, DEVICES, PLANTS, PLATFORM)
