"""Erasure, legal holds, retention, seals and exports: the use cases behind commands, routes and duties."""
