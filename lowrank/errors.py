"""Messages that name the nearest way out. A leaf: it imports nothing of ours."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'rank'?)" for the nearest known name, or "" where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`: it says which there are and which is nearest."""
    known = sorted(known)
    return ValueError(f"unknown {what} {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}")


class FileFormatError(ValueError):
    """A file is damaged, truncated or not what its name says. The message names the file and the place."""


class ConfigError(ValueError):
    """A configuration cannot be run as it stands: an unknown key, a bad value, an output folder in use."""
