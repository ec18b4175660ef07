"""Takes passwords and tokens out of what is shown, logged or stored."""

from __future__ import annotations

import re

_HIDDEN = "***"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
_SECRET = re.compile(
    r"([?&;#][^=&;#]*(?:passw|pwd|token|secret|key|credential|signature|auth)[^=&;#]*=)[^&;#]*",
    re.IGNORECASE,
)
_OF_FILES = ("sqlite", "file")


def redact_uri(uri: str) -> str:
    """`uri` without user name, password and secret parameters, safe to be shown or logged.

    A password may hold any character: all before the last @ is taken for it.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if not scheme.startswith(_OF_FILES):
        place, mark, query = rest.partition("?")
        if "@" in query and ":" in place:
            # The question mark may be a part of the password: nothing is known to be harmless.
            return f"{scheme}{separator}{_HIDDEN}"
        if "@" in place:
            place = f"{_HIDDEN}@{place.rpartition('@')[2]}"
        rest = f"{place}{mark}{query}"
    return _SECRET.sub(rf"\1{_HIDDEN}", f"{scheme}{separator}{rest}")


def redacted(text: str) -> str:
    """`text` with each URI in it redacted."""
    return _URI.sub(lambda uri: redact_uri(uri[0]), text)
