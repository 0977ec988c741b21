"""The operator's view: checks, figures, heartbeats and effective settings."""
