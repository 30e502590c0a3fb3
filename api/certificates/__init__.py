"""Certificates of plants."""
