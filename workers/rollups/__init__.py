"""Roll-ups: what each series came to in 5 minutes, hours and days. Left out: who asks for them (`api`)."""
