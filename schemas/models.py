"""The catalogue of device models: how each sends by itself, and whether it can be asked to show itself.

Whatever is not listed is one of the generic models at the end. Left out: how what they send is read.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

SHELLY_GET: Final = "shelly_get"
"""Requests by GET whose values stand in the URL: the token is part of it."""
SHELLY_POST: Final = "shelly_post"
"""RPC notifications, as the firmware's outbound requests post them."""
JSON_POST: Final = "json_post"
LINE_PROTOCOL: Final = "line_protocol"
LORAWAN_WEBHOOK: Final = "lorawan_webhook"
THINGSPEAK: Final = "thingspeak"
THINGSBOARD: Final = "thingsboard"
MQTT: Final = "mqtt"


class Model(NamedTuple):
    """A kind of hardware."""

    name: str
    vendor: str
    title: str
    ingest_url_kind: str
    identifies: bool = False
    """Whether it can make itself seen when told to over a downlink."""
    listens: bool = False
    """Whether what runs on it is told to under `opensense/…/cmd/`: others have topics of their own."""


MODELS: Final = {
    model.name: model
    for model in (
        Model("shelly-h-t", "Shelly", "H&T (Gen1)", SHELLY_GET),
        Model("shelly-h-t-plus", "Shelly", "Plus H&T", SHELLY_GET),
        Model("shelly-h-t-gen3", "Shelly", "H&T Gen3", SHELLY_GET),
        Model("shelly-flood", "Shelly", "Flood", SHELLY_GET),
        Model("shelly-flood-gen4", "Shelly", "Flood Gen4", SHELLY_GET),
        Model("shelly-door-window-2", "Shelly", "Door/Window 2", SHELLY_GET),
        Model("shelly-motion-2", "Shelly", "Motion 2", SHELLY_GET),
        Model("shelly-button-1", "Shelly", "Button 1", SHELLY_GET),
        Model("shelly-uni", "Shelly", "Uni", SHELLY_GET),
        Model("shelly-1pm", "Shelly", "1PM", MQTT),
        Model("shelly-em", "Shelly", "EM", MQTT),
        Model("shelly-3em", "Shelly", "3EM", MQTT),
        Model("shelly-plus-1pm", "Shelly", "Plus 1PM", SHELLY_POST),
        Model("shelly-plus-plug-s", "Shelly", "Plus Plug S", SHELLY_POST, identifies=True),
        Model("shelly-pro-3em", "Shelly", "Pro 3EM", SHELLY_POST),
        Model("shelly-pm-mini-gen3", "Shelly", "PM Mini Gen3", SHELLY_POST),
        Model("tasmota", "Tasmota", "Any device with Tasmota", MQTT, identifies=True),
        Model("esphome", "ESPHome", "Any device with ESPHome", MQTT, identifies=True, listens=True),
        Model("diy_esp32", "Self-made", "ESP32", JSON_POST, identifies=True, listens=True),
        Model("diy_esp8266", "Self-made", "ESP8266", JSON_POST, identifies=True, listens=True),
        Model("diy_raspberry_pi", "Self-made", "Raspberry Pi", JSON_POST),
        Model("lorawan_ttn", "The Things Industries", "A LoRaWAN device on The Things Stack", LORAWAN_WEBHOOK),
        Model("telegraf", "InfluxData", "Telegraf", LINE_PROTOCOL),
        Model("thingspeak_client", "MathWorks", "A device made for ThingSpeak", THINGSPEAK),
        Model("thingsboard_client", "ThingsBoard", "A device made for ThingsBoard", THINGSBOARD),
        Model("sparkplug_b", "Eclipse", "A Sparkplug B edge node or device", MQTT),
        Model("generic_json", "Any", "Posts JSON", JSON_POST),
        Model("generic_line_protocol", "Any", "Posts InfluxDB line protocol", LINE_PROTOCOL),
        Model("generic_mqtt", "Any", "Publishes by MQTT", MQTT),
    )
}


def ingest_url_kind(model: str | None) -> str:
    """How a device of this model sends; one that names none can always post JSON."""
    known = MODELS.get(model or "")
    return JSON_POST if known is None else known.ingest_url_kind


def models_like(text: str) -> Sequence[str]:
    """The names that hold `text`, whatever its case."""
    wanted = text.lower()
    return [name for name in MODELS if wanted in name.lower()]
