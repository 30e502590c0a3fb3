"""The Devices face, under `/v1`: hardware units, as its document says. Left out: sending readings (`ingest.http`)."""
