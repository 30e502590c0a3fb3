"""`sluice verify`: whether every reading of the log is where the promise says, and every stored row came from it.

Read in this order: `run` (the passes, and what can be judged), `reading` (records into claims), `claims` (sorting
them), `matching` (claims against rows), `notes` (what stands beside rows), `strays` (rows of nobody), `ledger`
(counts against the books), `store` and `sql` (what the database is asked).
"""
