"""What leaves the archive: the change feed, and the follow-ups that are made of it."""
