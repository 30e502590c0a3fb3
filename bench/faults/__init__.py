"""`sluice bench faults`: load with recorded acknowledgements, a fault in its middle, then every reading looked up.

`traffic` says what is sent, `sender` sends it and keeps the record, `stage` is what runs, `catalogue` what happens to
it, `check` compares the record with the store, `run` has the order of events, `figures` what they are judged by.
"""
