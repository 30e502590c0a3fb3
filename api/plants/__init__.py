"""The Plants face, under `/api/v1/plants`: plants, their security and commands, as its document says."""
