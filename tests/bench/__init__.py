"""`make bench`: how fast events become durable, against three baselines measured in the same run."""
