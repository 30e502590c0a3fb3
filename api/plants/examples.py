"""What the Plants face's document prints, with the ids that it shortens to `string`."""

from typing import Any, Final

_MOMENT: Final = "2019-08-24T14:15:22Z"
_TEMPLATE: Final = {
    "actions": [{}],
    "createdAt": _MOMENT,
    "id": "497f6eca-6276-4993-bfeb-53cbbbba6f08",
    "isSystem": True,
    "level": "PLANT",
    "name": "string",
    "signals": [{}],
    "type": "CABINET",
    "updatedAt": _MOMENT,
    "version": 0,
}
PLANT: Final[dict[str, Any]] = {
    "activatedAt": _MOMENT,
    "authFailureCount": 0,
    "authMethod": "MTLS",
    "certificateExpiresAt": _MOMENT,
    "certificateFingerprint": "string",
    "certificateSerialNumber": "string",
    "createdAt": _MOMENT,
    "id": "string",
    "lastAuthFailureAt": _MOMENT,
    "lastSeenAt": _MOMENT,
    "lifecycleStatus": "PENDING",
    "metadata": {},
    "name": "string",
    "organizationId": "7bc05553-4b68-44e8-b7bc-37be63c6d9e9",
    "secretRotatedAt": _MOMENT,
    "serialNumber": "string",
    "status": "ONLINE",
    "template": _TEMPLATE,
    "templateId": "196100ac-4eec-4fb6-a7f7-86c8b584771d",
    "type": "SENSOR",
    "updatedAt": _MOMENT,
}
_META: Final = {"limit": 0, "page": 0, "total": 0, "totalPages": 0}
PLANTS: Final = {"data": [PLANT], "meta": _META}
PLANT_TO_CREATE: Final = {"name": "string", "serialNumber": "string", "type": "SENSOR"}
PLANT_TO_UPDATE: Final[dict[str, Any]] = {}
WHOLE_PLANT: Final[dict[str, Any]] = PLANT | {
    "alerts": [
        {
            "acknowledgedAt": _MOMENT,
            "acknowledgedBy": "string",
            "createdAt": _MOMENT,
            "id": "string",
            "message": "string",
            "plantId": "string",
            "resolvedAt": _MOMENT,
            "severity": "INFO",
            "status": "ACTIVE",
            "type": "THRESHOLD_EXCEEDED",
            "updatedAt": _MOMENT,
        }
    ],
    "capacityKwh": 0,
    "configEnabled": True,
    "description": "string",
    "esiState": "PLC_READY",
    "externalPlantId": "string",
    "fvePeakPowerKwp": 0,
    "latitude": 0,
    "longitude": 0,
    "plantGroups": [
        {
            "createdAt": _MOMENT,
            "description": "string",
            "id": "497f6eca-6276-4993-bfeb-53cbbbba6f08",
            "name": "string",
            "organizationId": "7bc05553-4b68-44e8-b7bc-37be63c6d9e9",
            "updatedAt": _MOMENT,
        }
    ],
    "plantWithLoad": True,
    "tag": "string",
}
CERTIFICATE_STATS: Final = {
    "active": 0,
    "atRiskPlants": [
        {
            "authMethod": "MTLS",
            "certificateExpiresAt": _MOMENT,
            "id": "497f6eca-6276-4993-bfeb-53cbbbba6f08",
            "lifecycleStatus": "PENDING",
            "name": "string",
            "serialNumber": "string",
        }
    ],
    "expired": 0,
    "expiringSoon": 0,
    "nextRenewalAt": _MOMENT,
    "revoked": 0,
}
SAID: Final = {"message": "string"}
ENERGY: Final = {"date": "string", "exported": 0, "imported": 0, "produced": 0, "selfConsumptionPct": 0}
MQTT_TOKEN: Final = {"expiresAt": _MOMENT, "token": "string"}
PACKAGE: Final = {
    "authMethod": "MTLS",
    "mqtt": {
        "broker": "string",
        "port": 0,
        "topics": {"ack": "string", "commands": "string", "status": "string", "telemetry": "string"},
    },
    "plantId": "bb17678d-82fa-43da-92e5-df833ebe5344",
    "protocol": {},
    "security": {"caCert": "string", "clientCert": "string", "clientKey": "string", "hmacSecret": "string"},
}
ROTATED_SECRET: Final = {"gracePeriodMinutes": 0, "hmacSecret": "string"}
COMMAND: Final = {
    "ackedAt": _MOMENT,
    "cmdId": "string",
    "command": "string",
    "createdAt": _MOMENT,
    "id": "string",
    "payload": {},
    "plantId": "string",
    "response": {},
    "responseStatus": "string",
    "sentAt": _MOMENT,
}
COMMANDS: Final = {"data": [COMMAND], "meta": _META}
COMMAND_TO_SEND: Final = {"command": "reboot"}
