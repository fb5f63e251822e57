"""What a header says: a plain name, units, and words that tell what the column is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection


def words(*lines: str) -> tuple[str, ...]:
    """The words of some lines."""
    return tuple(" ".join(lines).split())


_SIMPLE = words(
    "W kW mW MW s ms us ns min h d K degC C F m mm cm dm um nm km ft g kg mg ug t N kN mN Pa kPa MPa GPa hPa mbar bar",
    "psi J kJ mJ MJ eV keV V mV kV A mA uA Hz kHz MHz GHz rpm mol mmol umol nmol M mM uM nM l L ml mL ul uL dl ohm",
    "kohm T mT deg rad lm lx cd dB ppm ppb pct percent % HV HRC pH IU U cps cP rev px mol% wt% vol% at%",
)
_PLAIN_UNITS = {"pct": "%", "percent": "%", "C": "degC"}
_DURATIONS = words("t time duration age hold dwell delay elapsed")
_EXPONENT = re.compile(r"([A-Za-z%]+?)(-?[1-4])?")


def name_and_units(header: str) -> tuple[str, str, str]:
    """A plain name, the units that a header carries, and why; "Power (W)" is power in W, "T_C" is T_C in degC.

    Example::

        >>> name_and_units("Scan speed [mm/s]")[:2], name_and_units("width_um")[:2]
        (('scan_speed', 'mm/s'), ('width_um', 'um'))
    """
    text = _letters(header).strip()
    inside = re.fullmatch(r"(.*?)\s*[(\[{]\s*([^()\[\]{}]*)\s*[)\]}]\s*(.*)", text)
    if inside and inside[1]:
        return _plain(f"{inside[1]} {inside[3]}"), plain_units(inside[2]), "in brackets in the header"
    after = re.fullmatch(r"(.+?)\s*(?:,|\bin\b|/|:|=)\s*(\S+(?:\s*/\s*\S+)?)", text)
    if after and _known(after[2]):
        return _plain(after[1]), plain_units(after[2]), "after the name in the header"
    parts = re.split(r"[_\s]+", text)
    for start in range(1, len(parts)):
        tail = parts[start:]
        if all(_known(part) for part in tail) and not _doubtful(parts[:start], tail):
            units = plain_units(tail[0]) + "".join(f"/{plain_units(part).lstrip('/')}" for part in tail[1:])
            return (text if _is_plain(text) else _plain("_".join(parts))), units, "at the end of the header"
    return (text if _is_plain(text) else _plain(text)), "", ""


def _doubtful(stem: list[str], tail: list[str]) -> bool:
    """Whether what looks like units may be something else: x_C and x_V are elements, a_min is the least a."""
    lonely = len(stem) == 1 and len(stem[0]) == 1 and stem[0].islower() and stem[0] != "t"
    return (lonely and len(tail[-1]) == 1) or (tail == ["min"] and says(" ".join(stem), _DURATIONS) is None)


def _letters(text: str) -> str:
    """One spelling of letters that look alike; micro is u."""
    text = text.replace("²", "2").replace("³", "3").replace("·", "*")
    return unicodedata.normalize("NFKC", text).replace("μ", "u")


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text) is not None


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9]+", "_", letters).strip("_").lower()
    return name if name and name[0].isalpha() else f"column_{name}".rstrip("_")


def _known(text: str) -> bool:
    """Whether a text is made of known units only."""
    factors = [part for part in re.split(r"[/*·. ()]+", text.replace("°C", "degC").replace("°", "deg")) if part]
    return bool(factors) and all(
        (match := _EXPONENT.fullmatch(factor.replace("^", ""))) is not None and match[1] in _SIMPLE
        for factor in factors
    )


def plain_units(text: str) -> str:
    """Units in letters of any keyboard; "" for what has none."""
    units = _letters(text).strip().replace("°", "deg").replace("^", "").replace("²", "2").replace("³", "3")
    return "" if units in ("-", "1", "") else _PLAIN_UNITS.get(units, units)


def tokens(header: str) -> set[str]:
    """The words of a header in small letters, long ones without a plural s."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", header).lower()
    return {_stem(word) for word in re.split(r"[^a-z]+", apart) if word}


def says(header: str, known: Collection[str]) -> str | None:
    """The first `known` word that a header holds."""
    found = tokens(header)
    return next((word for word in known if _stem(word) in found), None)


def _stem(word: str) -> str:
    return word.rstrip("s") if len(word) > 4 else word
