"""The way out: readings as they were stored, to those who may see them."""
