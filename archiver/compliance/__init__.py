"""Erasure, legal holds, retention, seals and exports: use cases for a command, a route and a duty."""
