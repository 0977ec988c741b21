"""The check of `archiver doctor` on the identity provider."""

import asyncio
from collections.abc import Iterator

from archiver.console import openid
from archiver.errors import sentence
from archiver.operations.doctor import Finding
from archiver.settings import Settings, SettingsError


def examine_provider(configuration: Settings) -> Iterator[Finding]:
    """Check whether the identity provider of the console, if there is one, can be reached and used."""
    if not configuration.oidc_issuer or configuration.console == "off":
        return
    try:
        openid.require(configuration)
    except SettingsError as error:
        yield Finding("OpenID Connect", "failure", "No one can log in with the identity provider.", sentence(error))
        return
    from archiver.console.openid.provider import Provider, ProviderError  # noqa: PLC0415  # needs an extra

    try:
        yield Finding("OpenID Connect", "ok", asyncio.run(Provider(configuration).check()))
    except (ProviderError, SettingsError) as error:
        advice = "Check ARCHIVER_OIDC_ISSUER, and that this machine can reach it."
        yield Finding("OpenID Connect", "failure", f"{configuration.oidc_issuer}: {error}.", advice)
