"""`sluice simulate`: plants that do what real ones do, and keep account of it.

`speech` says what they send and understand, `plants` makes them through the API, `device` is one that is connected,
`fleet` is all of them. It drives the system from outside: HTTP and MQTT, with what a package holds. Left out: what
becomes of what they send (`bench.mqtt` counts that).
"""
