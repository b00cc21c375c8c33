"""The page at /: one file, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

PAGE = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
#: Nothing may be loaded from elsewhere, framed, or sent on.
PAGE_HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
