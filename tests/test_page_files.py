"""The chat page's files: complete, within their policy, and unchanged where vendored."""

import hashlib
import re
from pathlib import Path

import pytest

from pyllama_dist.api import page

VENDORED = [Path(page.__file__).parent, Path(__file__).parent / "vendor"]


def test_every_file_that_the_page_loads_is_served() -> None:
    served = page.files()
    for name, (content, media_type) in served.items():
        text = content.decode()
        for reference in re.findall(r'(?:href|src)="page/([^"]+)"', text):
            assert reference in served
        if media_type.startswith("text/javascript"):
            for reference in re.findall(r'from "\./([^"]+)"', text):
                assert reference in served, name
    assert set(served) == {
        "answer.js", "chat.js", "dom.js", "events.js", "index.html", "markdown.js", "messages.js",
        "nodes.js", "server.js", "smd.LICENSE.txt", "smd.js", "style.css",
    }  # fmt: skip


def test_no_file_needs_what_the_policy_forbids() -> None:
    html = page.files()["index.html"][0].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert not re.search(r'(?:href|src)="(?!page/|data:)', html)
    for name, (content, _) in page.files().items():
        assert not re.search(
            rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", content
        ), name


def test_the_policy_lets_in_what_comes_from_this_server_only() -> None:
    assert page.HEADERS["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert page.HEADERS["X-Content-Type-Options"] == "nosniff"
    assert page.HEADERS["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("directory", VENDORED, ids=["page", "tests"])
def test_files_of_others_are_as_recorded(directory: Path) -> None:
    rows = re.findall(r"\| `(\S+)` \|.*`([0-9a-f]{64})`", (directory / "VENDORED.md").read_text())
    assert rows
    for name, digest in rows:
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
