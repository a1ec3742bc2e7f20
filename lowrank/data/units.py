"""Units of measurement: conventional to SI by code, so that a converted interval is never typed by hand.

value [to] = value [unit] * factor(unit) / factor(to)                      within one dimension
value [to] = value [unit] * factor(unit) / (molar mass * factor(to))       mass to amount; molar mass in g/mol
"""

import re

# dimension -> unit -> factor to the dimension's base unit
_FACTORS = {
    "mass/volume": {
        "g/L": 1.0,
        "g/dL": 10.0,
        "mg/dL": 1e-2,
        "mg/L": 1e-3,
        "µg/mL": 1e-3,
        "µg/dL": 1e-5,
        "µg/L": 1e-6,
        "ng/mL": 1e-6,
        "ng/dL": 1e-8,
        "ng/L": 1e-9,
        "pg/mL": 1e-9,
    },
    "amount/volume": {"mol/L": 1.0, "mmol/L": 1e-3, "µmol/L": 1e-6, "nmol/L": 1e-9, "pmol/L": 1e-12},
    "catalytic activity/volume": {"U/L": 1.0, "µkat/L": 60.0},
    "international units/volume": {"IU/L": 1.0, "IU/mL": 1e3, "mIU/mL": 1.0, "mIU/L": 1e-3, "µIU/mL": 1e-3},
    "count/volume": {"/µL": 1e6, "x10^9/L": 1e9, "x10^12/L": 1e12, "million/µL": 1e12},
    "pressure": {"mmHg": 133.322, "kPa": 1e3},
    "fraction": {"%": 1e-2},
    "mass/day": {"g/24 h": 1.0, "mg/24 h": 1e-3, "µg/24 h": 1e-6},
    "amount/day": {"µmol/24 h": 1e-6, "nmol/24 h": 1e-9},
    "time": {"s": 1.0, "min": 60.0},
    "speed": {"mm/h": 1.0},
    "length": {"mm": 1e-3, "cm": 1e-2, "m": 1.0, "km": 1e3},
    "mass": {"kg": 1.0, "g": 1e-3, "mg": 1e-6, "pg": 1e-15},
    "volume": {"fL": 1e-15, "L": 1.0, "mL": 1e-3},
}
UNITS = {unit: (dimension, factor) for dimension, units in _FACTORS.items() for unit, factor in units.items()}
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
