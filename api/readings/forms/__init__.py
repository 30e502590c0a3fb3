"""The forms of tables of readings: JSON by rows and by columns, CSV, NDJSON, Arrow. One interface for every answer.

A table goes through in blocks, so that what is held of it at once is bounded. Left out: what stands in it.
"""
