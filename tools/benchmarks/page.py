"""A page of tables, with a section for each machine."""

import re

__all__ = ["put_section"]


def put_section(page: str, title: str, body: str) -> str:
    """The page with a section of this title: in the place of the one that has it, else at the end.

    Args:
        page: Markdown, whose sections begin with ``## ``.
        title: one line.
        body: without headings of that level.
    """
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    found = old.search(page)
    if found is None:
        return f"{page.rstrip()}\n\n{section}"
    rest = page[found.end() :]
    return page[: found.start()] + section + (f"\n{rest}" if rest else "")
