"""The platform face (`/api/v1`): its operations. Left out: what they ask of the registry and the store."""
