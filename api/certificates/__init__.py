"""The certificate authority: who signs, what devices and brokers are given, and what is revoked.

Left out: HTTP (`api.platform.certificates`), and what an operator does (`deploy.certificates`).
"""
