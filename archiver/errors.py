"""What is wrong with a setting."""


class SettingsError(Exception):
    """A setting is missing or wrong; the text names it and says what to do."""
