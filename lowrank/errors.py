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


def at_least(settings: object, least: int, *names: str, group: str = "") -> None:
    """ValueError for the first of these settings that is below `least`; None, a setting's own default, passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{group}{name} must be at least {least}, got {value}")


class FileFormatError(ValueError):
    """A file is damaged, truncated or not what its name says. The message names the file and the place."""


class ConfigError(ValueError):
    """A configuration cannot be run as it stands: an unknown key, a bad value, an output folder in use."""


def check_fields(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """FileFormatError for a field that the reader of this file does not know."""
    for name in given:
        if name not in known:
            raise FileFormatError(f"{where}: {unknown('field', name, known)}")
