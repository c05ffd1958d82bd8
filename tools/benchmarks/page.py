"""A Markdown page with one section for each machine."""

import re

__all__ = ["put_section"]


def put_section(page: str, title: str, body: str) -> str:
    """Return the page with a section: it replaces the one with its title, or is appended.

    Args:
        page: Markdown; sections begin with ``## ``.
        title: title of the section, one line.
        body: text of the section, without ``## ``.
    """
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    found = old.search(page)
    if found is None:
        return f"{page.rstrip()}\n\n{section}"
    rest = page[found.end() :]
    return page[: found.start()] + section + (f"\n{rest}" if rest else "")
