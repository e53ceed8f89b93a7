"""Failures that a user is told about in one line, which names the file or setting and says what to do."""


class GridpruneError(Exception):
    """Something failed that is not the input's fault.

    reason  what is wrong and what to do about it. Settings that it names stand in backticks, by their names in Python,
            alone or with a value: "take `relevance=words`"
    field   the setting at fault, by its name in Python: "keep", "cache_limit"
    value   what it was set to, where that helps
    place   what the failure is about, in front of everything else: a file, a line of one

    `str` gives "PLACE: FIELD=VALUE: REASON". The command line shows settings as its options, "--keep 1.5: ...".
    """

    exit_code = 1

    def __init__(
        self, reason: str, *, field: str | None = None, value: object = None, place: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.field, self.value, self.place = reason, field, value, place

    def __str__(self) -> str:
        setting = self.field if self.value is None else f"{self.field}={self.value}"
        return ": ".join(filter(None, (self.place, setting if self.field else None, self.reason)))

    def at(self, place: str) -> "GridpruneError":
        """The same failure, with one more place in front. Raise it `from` this one."""
        inside = f"{place}: {self.place}" if self.place else place
        return type(self)(self.reason, field=self.field, value=self.value, place=inside)

    def about(self, place: str) -> "GridpruneError":
        """The failure with a place in front, such as the file that it is about, unless it names that already."""
        if place in str(self) or ascii(place) in str(self):  # as it is written where it can't be printed
            return self
        located = self.at(place)
        located.__cause__ = self.__cause__
        return located


class BadInput(GridpruneError):
    """A file, setting or value that can't be used."""

    exit_code = 2


class NoScene(BadInput):
    """A picture that the embedded model does not know, where no model was chosen."""


DOWNLOAD = "gridprune-download"  # name of the thread of a download, which outlives an interrupt
