"""Send data out of the archive: the change feed, and the follow-ups that are created from it."""
