"""The landing role: from the log into the store, each reading once.

To read in this order: `worker` (who does what when), `holding`, `pipeline` (reading ahead, writing), `plan` (what is
written), `store` with `staging` and `books` (the transaction), `apart` (what the database refuses), `leases`,
`registry`, `failures`; `columns` makes it fast.
"""
