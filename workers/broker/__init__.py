"""Whom the MQTT broker knows, kept equal to the registry."""
