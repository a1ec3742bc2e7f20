"""Conversions against values that every table of SI units prints."""

import pytest

from lowrank.data.units import UNITS, canonical, convert_text, factor, same_unit


@pytest.mark.parametrize(
    ("value", "unit", "to", "molar_mass", "expected"),
    [
        (100, "mg/dL", "mmol/L", 180.16, 5.55),  # glucose
        (1.0, "mg/dL", "µmol/L", 113.12, 88.4),  # creatinine
        (1.0, "mg/dL", "µmol/L", 584.66, 17.1),  # bilirubin
        (10, "mg/dL", "mmol/L", 40.08, 2.495),  # calcium
        (200, "mg/dL", "mmol/L", 386.65, 5.17),  # cholesterol
        (10, "µg/dL", "nmol/L", 362.46, 275.9),  # cortisol
        (4, "g/dL", "g/L", None, 40),
        (40, "mmHg", "kPa", None, 5.33),
        (60, "U/L", "µkat/L", None, 1.0),
        (5.55, "mmol/L", "mg/dL", 180.16, 100),
    ],
)
def test_conversions_that_tables_print(value, unit, to, molar_mass, expected) -> None:
    assert value * factor(unit, to, molar_mass) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("unit", sorted(UNITS))
def test_a_unit_converts_to_itself_by_one(unit: str) -> None:
    assert factor(unit, unit) == 1
    assert canonical(unit) == unit
    assert same_unit(unit, unit)


def test_conversion_and_back_is_the_identity() -> None:
    for unit in ("mg/dL", "g/L", "ng/mL"):
        assert factor(unit, "µmol/L", 250.0) * factor("µmol/L", unit, 250.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "unit", "to", "molar_mass", "expected"),
    [
        ("70-99", "mg/dL", "mmol/L", 180.16, "3.9-5.5"),
        ("8.5-10.5", "mg/dL", "mmol/L", 40.08, "2.12-2.62"),
        ("below 200", "mg/dL", "mmol/L", 386.65, "below 5.2"),
        ("700-1600", "mg/dL", "g/L", None, "7.0-16"),
        ("35-45", "mmHg", "kPa", None, "4.7-6.0"),
    ],
)
def test_an_interval_keeps_its_words_and_its_significant_digits(text, unit, to, molar_mass, expected) -> None:
    assert convert_text(text, unit, to, molar_mass) == expected


def test_two_names_of_one_unit() -> None:
    assert same_unit("ng/mL", "µg/L")
    assert same_unit("ug/L", "\u03bcg/L")
    assert not same_unit("mg/dL", "mg/L")
    assert not same_unit("mg/dL", "mmol/L")


def test_what_cannot_be_converted_says_why() -> None:
    with pytest.raises(ValueError, match="unknown unit 'mg/Dl'"):
        factor("mg/Dl", "g/L")
    with pytest.raises(ValueError, match="molar mass"):
        factor("mg/dL", "mmol/L")
    with pytest.raises(ValueError, match=r"mmHg \(pressure\) cannot be converted to g/L"):
        factor("mmHg", "g/L")
