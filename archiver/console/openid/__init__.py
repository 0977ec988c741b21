"""Log in with a provider of OpenID Connect: authorization code flow with PKCE, state and nonce."""

from archiver.settings import Settings, SettingsError


def require(configuration: Settings) -> None:
    """Raise `SettingsError` if the settings name a provider, and the extra that it needs is not installed."""
    if not configuration.oidc_issuer or configuration.console == "off":
        return
    try:
        import authlib.oidc.core  # noqa: F401, PLC0415  # an extra, and slow to import
    except ImportError as error:
        raise SettingsError(
            "ARCHIVER_OIDC_ISSUER needs authlib, which is not installed: pip install 'callhq-archiver[oidc]'"
        ) from error
