"""Units of measurement: conventional to SI by code, so that a converted interval is never typed by hand.

value [to] = value [unit] * factor(unit) / factor(to)                      within one dimension
value [to] = value [unit] * factor(unit) / (molar mass * factor(to))       mass to amount; molar mass in g/mol
"""

import re

# unit -> (dimension, factor to the dimension's base unit)
UNITS: dict[str, tuple[str, float]] = {
    "g/L": ("mass/volume", 1.0),
    "g/dL": ("mass/volume", 10.0),
    "mg/dL": ("mass/volume", 1e-2),
    "mg/L": ("mass/volume", 1e-3),
    "µg/mL": ("mass/volume", 1e-3),
    "µg/dL": ("mass/volume", 1e-5),
    "µg/L": ("mass/volume", 1e-6),
    "ng/mL": ("mass/volume", 1e-6),
    "ng/dL": ("mass/volume", 1e-8),
    "ng/L": ("mass/volume", 1e-9),
    "pg/mL": ("mass/volume", 1e-9),
    "mol/L": ("amount/volume", 1.0),
    "mmol/L": ("amount/volume", 1e-3),
    "µmol/L": ("amount/volume", 1e-6),
    "nmol/L": ("amount/volume", 1e-9),
    "pmol/L": ("amount/volume", 1e-12),
    "U/L": ("catalytic activity/volume", 1.0),
    "µkat/L": ("catalytic activity/volume", 60.0),
    "IU/L": ("international units/volume", 1.0),
    "IU/mL": ("international units/volume", 1e3),
    "mIU/mL": ("international units/volume", 1.0),
    "mIU/L": ("international units/volume", 1e-3),
    "µIU/mL": ("international units/volume", 1e-3),
    "/µL": ("count/volume", 1e6),
    "x10^9/L": ("count/volume", 1e9),
    "x10^12/L": ("count/volume", 1e12),
    "million/µL": ("count/volume", 1e12),
    "mmHg": ("pressure", 133.322),
    "kPa": ("pressure", 1e3),
    "%": ("fraction", 1e-2),
    "g/24 h": ("mass/day", 1.0),
    "mg/24 h": ("mass/day", 1e-3),
    "µg/24 h": ("mass/day", 1e-6),
    "µmol/24 h": ("amount/day", 1e-6),
    "nmol/24 h": ("amount/day", 1e-9),
    "s": ("time", 1.0),
    "min": ("time", 60.0),
    "mm/h": ("speed", 1.0),
    "mm": ("length", 1e-3),
    "cm": ("length", 1e-2),
    "m": ("length", 1.0),
    "km": ("length", 1e3),
    "kg": ("mass", 1.0),
    "g": ("mass", 1e-3),
    "mg": ("mass", 1e-6),
    "fL": ("volume", 1e-15),
    "L": ("volume", 1.0),
    "mL": ("volume", 1e-3),
    "pg": ("mass", 1e-15),
}
_MOLAR = {"mass/volume": "amount/volume", "mass/day": "amount/day"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def canonical(unit: str) -> str:
    """One spelling of a unit: the micro sign of its two code points and the letter u, "seconds" and "percent"."""
    unit = unit.strip().replace("\u03bc", "µ")
    unit = re.sub(r"\bu(?=(?:g|mol|kat|IU|L)\b)", "µ", unit)
    return {"seconds": "s", "sec": "s", "percent": "%", "mcg/dL": "µg/dL"}.get(unit, unit)


def factor(unit: str, to: str, molar_mass: float | None = None) -> float:
    """What a number in `unit` is multiplied by to be a number in `to`."""
    for name in (unit, to):
        if canonical(name) not in UNITS:
            raise ValueError(f"unknown unit {name!r}; known: {', '.join(UNITS)}")
    (dimension, scale), (wanted, to_scale) = UNITS[canonical(unit)], UNITS[canonical(to)]
    if dimension == wanted:
        return scale / to_scale
    if _MOLAR.get(dimension) == wanted or _MOLAR.get(wanted) == dimension:
        if not molar_mass:
            raise ValueError(f"{unit} to {to} goes from mass to amount of substance: it needs a molar mass in g/mol")
        return scale / to_scale / molar_mass if dimension.startswith("mass") else scale / to_scale * molar_mass
    raise ValueError(f"{unit} ({dimension}) cannot be converted to {to} ({wanted})")


def convert(value: float, unit: str, to: str, molar_mass: float | None = None) -> float:
    return value * factor(unit, to, molar_mass)


def same_unit(a: str, b: str) -> bool:
    """Two names of one unit: ng/mL and µg/L."""
    a, b = canonical(a), canonical(b)
    if a == b:
        return True
    return a in UNITS and b in UNITS and UNITS[a][0] == UNITS[b][0] and abs(factor(a, b) - 1) < 1e-9


def convert_text(text: str, unit: str, to: str, molar_mass: float | None = None) -> str:
    """Every number of "70-99" or "below 5" converted, to the significant digits of the most precise one, at least 2."""
    scale = factor(unit, to, molar_mass)
    digits = max([2, *map(_significant, _NUMBER.findall(text))])
    return _NUMBER.sub(lambda match: _rounded(float(match.group()) * scale, digits), text)


def _significant(number: str) -> int:
    """The digits that say something: 3 of 10.5 and of 0.105, 2 of 150 and of 0.70."""
    digits = number.replace(".", "").lstrip("0")
    return len(digits if "." in number else digits.rstrip("0"))


def _rounded(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    exponent = int(f"{value:e}".split("e")[1])
    places = max(0, digits - 1 - exponent)
    return f"{round(value, digits - 1 - exponent):.{places}f}"
