"""Retention: what nobody keeps any more goes, as whole chunks where it can. Left out: erasing sites."""
