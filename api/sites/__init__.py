"""The Sites face: an organisation's sites, and the servers and edge devices that act for them."""
