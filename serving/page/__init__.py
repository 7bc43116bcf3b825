"""A page to chat with, at `/`: plain HTML, CSS and JavaScript that loads nothing from elsewhere."""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/markdown.js": ("markdown.js", "text/javascript"),
}
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serves the page's files."""
    for path, (name, kind) in _FILES.items():
        content = files(__name__).joinpath(name).read_bytes()

        def answer(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)
