"""Download one file from the package index that pip uses (Simple API, PEP 503 and 691).

``pip download`` does not work: it executes the archive to read its metadata, and newer versions
reject these. ``pip config list`` gives the configuration of pip, from its files, ``PIP_*``
variables and the virtual environment.
"""

from __future__ import annotations

import ast
import base64
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser

from .errors import PackagingError

DEFAULT_INDEX = "https://pypi.org/simple"
ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.1"
)
ATTEMPTS = 3
TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class PipSettings:
    """The part of pip's configuration that a download needs.

    Args:
        indexes: addresses of package indexes, in the order of search.
        cert: file or folder of certificates.
        proxy: address of the proxy.
    """

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    cert: str | None = None
    proxy: str | None = None


@dataclass(frozen=True)
class Answer:
    """Answer of a server: body, content type and address."""

    body: bytes
    content_type: str
    url: str


def download(project: str, filename: str) -> tuple[bytes, str]:
    """Download ``filename`` of ``project`` from the first index that lists it.

    Returns:
        The bytes, not verified, and their address.

    Raises:
        PackagingError: no index lists the file, or it cannot be downloaded.
    """
    settings = pip_settings()
    opener = build_opener(settings)
    failures = []
    for index in settings.indexes:
        address = f"{index.rstrip('/')}/{project}/"
        try:
            url = find_file(fetch(opener, address), filename)
            if url is not None:
                return fetch(opener, url).body, _without_login(url)
            failures.append(f"{_without_login(address)}: not listed")
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            failures.append(f"{_without_login(address)}: {reason}")
    raise PackagingError(f"{filename} cannot be downloaded ({'; '.join(failures)})")


def pip_settings() -> PipSettings:
    """Return the settings of pip; without pip, those of the environment variables."""
    # -I: during a build, PYTHONPATH hides the pip of the environment.
    pip = [sys.executable, "-I", "-m", "pip", "config", "list"]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    return parse_settings(result.stdout if result.returncode == 0 else "", os.environ)


def parse_settings(listing: str, environ: Mapping[str, str]) -> PipSettings:
    """Return the settings in the output of ``pip config list``; the environment overrides them."""
    options: dict[str, str] = {}
    for section in ("global.", "download.", "install."):
        for line in listing.splitlines():
            key, separator, value = line.partition("=")
            if separator and key.startswith(section):
                options[key.removeprefix(section)] = str(ast.literal_eval(value))
    for option in ("index-url", "extra-index-url", "cert", "proxy"):
        value = environ.get("PIP_" + option.upper().replace("-", "_"))
        if value:
            options[option] = value
    bundle = environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE")
    indexes = [options.get("index-url", DEFAULT_INDEX), *options.get("extra-index-url", "").split()]
    return PipSettings(tuple(indexes), options.get("cert", bundle), options.get("proxy"))


def build_opener(settings: PipSettings) -> urllib.request.OpenerDirector:
    """Return an opener with the certificates and the proxy of the settings."""
    context = ssl.create_default_context()
    if settings.cert:
        kind = "capath" if os.path.isdir(settings.cert) else "cafile"
        try:
            context.load_verify_locations(**{kind: settings.cert})
        except OSError as error:
            raise PackagingError(
                f"the certificates that pip is configured for, {settings.cert}, "
                f"cannot be read ({error}); correct PIP_CERT or pip's `cert`"
            ) from error
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if settings.proxy:
        proxies = {"http": settings.proxy, "https": settings.proxy}
        handlers.append(urllib.request.ProxyHandler(proxies))
    return urllib.request.build_opener(*handlers)


def fetch(opener: urllib.request.OpenerDirector, url: str) -> Answer:
    """Get ``url``; try again after failures of the server or the network."""
    if url.startswith("file:") and url.endswith("/"):
        url += "index.html"  # pip does the same for an index that is a folder
    headers = {"Accept": ACCEPT, "User-Agent": "detectron2-build"}
    user, separator, _ = urllib.parse.urlsplit(url).netloc.rpartition("@")
    if separator:
        login = urllib.parse.unquote(user).encode("utf-8")
        headers["Authorization"] = "Basic " + base64.b64encode(login).decode("ascii")
    request = urllib.request.Request(_without_login(url), headers=headers)
    attempt = 0
    while True:
        attempt += 1
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                content_type = answer.headers.get("Content-Type") or "text/html"
                return Answer(answer.read(), content_type, answer.geturl())
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if attempt == ATTEMPTS or refused or url.startswith("file:"):
                raise
        time.sleep(attempt)


def find_file(page: Answer, filename: str) -> str | None:
    """Return the address of ``filename`` on a project's page (JSON or HTML); None if it is absent.

    Indexes differ in the separator of project names, so ``-`` and ``_`` are treated as equal.
    """
    base = page.url
    if page.content_type.partition(";")[0].strip().lower().endswith("json"):
        links = [(entry["filename"], entry["url"]) for entry in json.loads(page.body)["files"]]
    else:
        parser = _Links()
        parser.feed(page.body.decode("utf-8", errors="replace"))
        base = urllib.parse.urljoin(base, parser.base)
        links = parser.links
    for text, href in links:
        if text.strip().replace("-", "_") == filename.replace("-", "_"):
            return urllib.parse.urljoin(base, href).partition("#")[0]
    return None


class _Links(HTMLParser):
    """Collects (text, href) of all anchors and the page's ``<base href>``."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.links: list[tuple[str, str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "base" and href:
            self.base = href
        elif tag == "a" and href:
            self.links.append(("", href))
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            text, href = self.links[-1]
            self.links[-1] = (text + data, href)


def _without_login(url: str) -> str:
    """Return ``url`` without user name and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
