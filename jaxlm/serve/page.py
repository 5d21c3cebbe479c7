"""The page at `/`: one file, whose script and style its own policy names by their hashes, so that no other runs."""

import base64
import hashlib
import html
import importlib.resources
import json
import re

from starlette.responses import Response


class Page:
    """The page for one model; `mode` is what it offers, `locked` whether it must ask for a key, `limit` the most new tokens."""

    def __init__(self, name: str, mode: str, locked: bool, limit: int = 0):
        text = importlib.resources.files("jaxlm.serve").joinpath("page.html").read_text(encoding="utf8")
        about = json.dumps({"name": name, "mode": mode, "locked": locked, "limit": limit}).replace("<", "\\u003c")
        self._body = text.replace("{{name}}", html.escape(name)).replace("{{about}}", about).encode("utf8", "replace")
        sources = {
            tag: " ".join(_hash(part) for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
            for tag in ("script", "style")
        }
        policy = {
            "default-src": "'none'", "script-src": sources["script"], "style-src": sources["style"], "connect-src": "'self'",
            "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        }  # fmt: skip
        self._headers = {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
        }  # fmt: skip

    def response(self) -> Response:
        return Response(self._body, headers=self._headers, media_type="text/html; charset=utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
