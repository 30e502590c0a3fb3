"""What the document of the Sites face prints, as the OpenAPI document and the tests have it."""

from typing import Any, Final

SITE_ID: Final = "f6a7b8c9-0d1e-2f3a-4b5c-6d7e8f9a0b1c"
ORG_ID: Final = "d4e5f6a7-8b9c-0d1e-2f3a-4b5c6d7e8f9a"
SITE_TO_CREATE: Final[dict[str, Any]] = {
    "name": "Mt Arthur Mine",
    "slug": "mt-arthur",
    "timezone": "Australia/Sydney",
    "location": {"latitude": -32.35, "longitude": 150.87, "address": "Mt Arthur Mine, Muswellbrook NSW"},
}
CREATED_SITE: Final[dict[str, Any]] = {
    "id": SITE_ID,
    "name": "Mt Arthur Mine",
    "slug": "mt-arthur",
    "url": "mt-arthur.consystence.site",
    "timezone": "Australia/Sydney",
    "location": {"latitude": -32.35, "longitude": 150.87, "address": "Mt Arthur Mine, Muswellbrook NSW"},
    "orgId": ORG_ID,
    "status": "provisioning",
    "createdAt": "2026-02-18T10:00:00Z",
}
LISTED_SITES: Final[dict[str, Any]] = {
    "data": [
        {
            "id": SITE_ID,
            "name": "Mt Arthur Mine",
            "slug": "mt-arthur",
            "url": "mt-arthur.consystence.site",
            "status": "online",
            "deviceCount": 4,
            "processCount": 2,
        }
    ]
}
SITE_TO_UPDATE: Final = {"name": "Mt Arthur Coal Mine", "timezone": "Australia/Sydney"}
SERVER_TO_REGISTER: Final = {
    "hardwareId": "auto-generated-fingerprint",
    "version": "10.1.0",
    "hostname": "consystence-server.local",
}
REGISTERED_SERVER: Final[dict[str, Any]] = {
    "siteToken": "eyJhbGciOiJSUzI1NiIs...",
    "config": {"orgId": ORG_ID, "siteId": SITE_ID, "clusteringMode": "AdoNet"},
}
EDGE_TO_REGISTER: Final = {
    "edgeId": "orin-north-01",
    "hardwareId": "auto-generated-fingerprint",
    "version": "10.1.0",
}
REGISTERED_EDGE: Final[dict[str, Any]] = {
    "edgeToken": "eyJhbGciOiJSUzI1NiIs...",
    "siteServerUrl": "https://site-server.local:5000",
    "config": {"pollIntervalMs": 100, "bufferRetentionDays": 7},
}
HEARTBEAT: Final = {"version": "10.1.0", "processCount": 2}
