"""Headers that several responses share."""

RETRY_AFTER = {"retry-after": "5"}  # RFC 9110, 15.6.4: a 503 may say when to come again, in seconds
