"""Failures that a user is told about in one line. The message names the file or flag, and what to do."""


class GridpruneError(Exception):
    """Something failed that is not the input's fault."""

    exit_code = 1


class BadInput(GridpruneError):
    """A file, flag or value that can't be used."""

    exit_code = 2


DOWNLOAD = "gridprune-download"  # name of the thread of a download, which outlives an interrupt
