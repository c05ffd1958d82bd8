"""Error of the build."""


class PackagingError(Exception):
    """The wheel cannot be built; the message says on one line what was wrong and what to do."""
