"""What an operator looks at: checks, figures, heartbeats, settings as they are used."""
