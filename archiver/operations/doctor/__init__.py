"""Check an installation: each check returns a finding and its remedy."""

from archiver.operations.doctor.database_checks import examine_database
from archiver.operations.doctor.environment import examine_platform, examine_settings, examine_spool
from archiver.operations.doctor.finding import Finding

__all__ = ["Finding", "examine_database", "examine_platform", "examine_settings", "examine_spool"]
