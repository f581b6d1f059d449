"""Linear algebra on the protocol."""
