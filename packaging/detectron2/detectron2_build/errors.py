"""The one error of this package: whatever stops the build, said in one line."""


class PackagingError(Exception):
    """The wheel cannot be built; the message says what was wrong and what to do."""
