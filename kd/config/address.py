"""The address of a server, as it may be written to files."""

from __future__ import annotations

from urllib.parse import urlsplit


def plain_address(text: str, key_name: str) -> str:
    """Scheme, host and path, without a slash at the end.

    key_name: environment variable of the server's key.

    Raises:
        ValueError: it is no http(s) address, or contains a login or parameters. The message does not repeat it.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:  # it may repeat a part of the address
        raise ValueError("invalid address; expected http://localhost:8000/v1 or the like") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "contains a login or parameters, which would be written to files; give the address without them and set "
            f"the key in the environment variable {key_name}"
        )
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
