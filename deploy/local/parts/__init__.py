"""The real parts of Sluice, run natively on one machine for developers, tests and benchmarks.

Nothing here is part of the product, and nothing here is meant for production.
"""
