"""What could be wrong with an installation, checked one by one, each with what to do about it."""

from archiver.operations.doctor.database_checks import examine_database
from archiver.operations.doctor.environment import examine_platform, examine_settings, examine_spool
from archiver.operations.doctor.finding import Finding

__all__ = ["Finding", "examine_database", "examine_platform", "examine_settings", "examine_spool"]
