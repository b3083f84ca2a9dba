"""The chat page: static files, without a build step and without a server.

`index.html` belongs at `/`, all files at `/page/<name>`. Every answer needs `HEADERS`: they forbid
scripts that are not the page's own, should text of the model ever become markup.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self'",
                "connect-src 'self'",
                "img-src 'self' data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


@cache
def files() -> Mapping[str, tuple[bytes, str]]:
    """The page's files: name to content and media type. Read once."""
    return MappingProxyType(
        {
            path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix])
            for path in sorted(Path(__file__).parent.iterdir())
            if path.suffix in _MEDIA_TYPES
        }
    )
