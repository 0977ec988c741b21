"""The console: pages for operators, compliance officers and analysts, served below /console."""

from archiver.console.application import Engines, routes

__all__ = ["Engines", "routes"]
