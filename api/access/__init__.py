"""Who calls: people with their access tokens, API keys, and what each may do. Left out: what is called."""
