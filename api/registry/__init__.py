"""The registry: organisations, sites, devices and their credentials, one place for each thing.

Every function runs in a transaction that acts for one organisation: row-level security decides what it sees, and what
it may not see is not there. Faces translate ids, names, errors and pages. Left out: HTTP, and who may call.
"""
