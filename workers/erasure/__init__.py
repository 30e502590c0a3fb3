"""Erases sites: what the API has asked for, in the background, until nothing of a site is left."""
