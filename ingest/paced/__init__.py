"""The paced lane: a backlog over its limit, accepted durably, and let into the log at the permitted rate."""
