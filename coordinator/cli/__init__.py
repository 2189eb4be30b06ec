"""`muster-coordinator`: one file per command group; the only place in coordinator/ that prints."""
