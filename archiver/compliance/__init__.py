"""Provide erasure, legal holds, retention, seals and exports as use cases for commands, routes and duties."""
