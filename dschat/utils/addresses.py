"""Addresses of servers, and names on the Hub: what is one, and which ones may get a key."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from dschat.errors import UserError

SCHEMES = ("http", "https")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def is_address(name: str) -> bool:
    """Tell an address from a path or a hub id."""
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def check_address(setting_name: str, url: str, example: str, key: str) -> None:
    """Refuse what is no address of a server.

    Args:
        example: of a right one. key: the environment variable that holds the server's key.

    Raises:
        UserError: naming the setting; of an address that holds a password, nothing else.
    """
    wrong = f"{setting_name} {url}: give an address such as {example}"
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        raise UserError(f"{setting_name}: give an address such as {example}") from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"{setting_name}: the address holds a name or a password, which others can read; put "
            f"the server's key into the environment variable {key}"
        )
    if not is_whole or parts.query or parts.fragment:
        raise UserError(wrong)


def may_hear_a_key(url: str) -> bool:
    """Return whether a key can be sent there safely: encrypted, or on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in THIS_MACHINE


def check_repository(name: str, setting_name: str) -> None:
    """Refuse a name that no repository on the Hub can have.

    Raises:
        UserError: naming the setting.
    """
    if _REPOSITORY.fullmatch(name) is None or ".." in name or "--" in name:
        raise UserError(f"{setting_name} is {name}: give OWNER/NAME, as in me/my-model")
