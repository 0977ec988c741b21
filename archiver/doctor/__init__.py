"""What could be wrong with an installation, checked one by one, each with what to do about it."""

from archiver.doctor.environment import examine_platform, examine_settings, examine_spool
from archiver.doctor.finding import Finding
from archiver.doctor.postgres import examine_database

__all__ = ["Finding", "examine_database", "examine_platform", "examine_settings", "examine_spool"]
