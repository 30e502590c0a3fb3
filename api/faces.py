"""Which faces there are. A path is the face's with the longest fitting prefix; the platform has all others."""

from typing import Final

from api.http.faces import DETAILED, ENVELOPE, PROBLEM, STATUSED, Face
from api.http.problems import INVALID, INVALID_BODY
from api.plants.codes import CODES

_BAD_JSON: Final = INVALID_BODY._replace(code="bad_json")

SITES: Final = Face("sites", "Sites", ("/api/organisations",), DETAILED, {INVALID: INVALID._replace(status=400)})
DEVICES: Final = Face("devices", "Devices", ("/v1",), ENVELOPE, {INVALID_BODY: _BAD_JSON})
PLANTS: Final = Face("plants", "Plants", ("/api/v1/plants", "/api/v1/telemetry"), STATUSED, CODES)
PLATFORM: Final = Face("platform", "Platform", ("/api",), PROBLEM)

FACES: Final = (SITES, DEVICES, PLANTS, PLATFORM)
