"""What is typed: names of variables in any spelling that leaves no doubt, and ``name=value,…``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

from pyro_invman.variables import DataError, Variable, Variables


class Names:
    """Variables by what they are called: their names, the headers that these came from, in letters of any size.

    Arguments:
        variables: of a model.
        headers: header in the table = name.

    Example::

        >>> variables = Variables([Variable("power", "parameter"), Variable("Gas", "condition")])
        >>> Names(variables, {"Power (W)": "power"}).pairs("gas=1,Power (W)=200", "given")
        {'Gas': '1', 'power': '200'}
    """

    def __init__(self, variables: Variables, headers: Mapping[str, str]) -> None:
        called = {name: name for name in variables.names}
        called |= {header: name for header, name in headers.items() if name in called and header not in called}
        self._called = called
        self._spelt: dict[str, set[str]] = {}
        for text, name in called.items():
            self._spelt.setdefault(text.casefold(), set()).add(name)
        self._variables = variables

    def of(self, text: str) -> str:
        """The name of the variable that is meant.

        Raises:
            DataError: none is called so, or several are.
        """
        text = text.strip()
        if text in self._called:
            return self._called[text]
        meant = self._spelt.get(text.casefold(), set())
        if len(meant) > 1:
            raise DataError(f"{text!r} may be {' or '.join(sorted(meant))}; write it as one of them is written")
        return next(iter(meant)) if meant else self._variables[self._variables.index(text)].name

    def variable(self, text: str) -> Variable:
        """The variable that is meant; errors as of `of`."""
        return self._variables[self._variables.index(self.of(text))]

    def list(self, text: str) -> list[str]:
        """``name,…`` as names; errors as of `of`."""
        return [self.of(each) for each in names(text, tuple(self._called))]

    def pairs(self, texts: Sequence[str] | str | None, what: str) -> dict[str, str]:
        """``name=value,…`` by name.

        Raises:
            DataError: a part is not name=value, an unknown name, or one that is given twice.
        """
        found: dict[str, str] = {}
        for text, value in pairs(texts, what, tuple(self._called)).items():
            name = self.of(text)
            if name in found:
                raise DataError(f"--{what}: {name} is given twice")
            found[name] = value
        return found


def pairs(texts: Sequence[str] | str | None, what: str, known: Sequence[str] = ()) -> dict[str, str]:
    """``name=value,…`` by name; a name that is `known` may hold commas and equals signs of its own.

    Raises:
        DataError: a part is not name=value.
    """
    given = [texts] if isinstance(texts, str) else list(texts or [])
    found: dict[str, str] = {}
    for part in chain.from_iterable(_parts(text, known) for text in given):
        name = next((each for each in _longest(known) if part.startswith(f"{each}=")), None)
        name, equals, value = part.partition("=") if name is None else (name, "=", part[len(name) + 1 :])
        if not equals or not name.strip() or not value.strip():
            raise DataError(f"--{what}: found {part!r}, expected name=value, separated by commas")
        found[name.strip()] = value.strip()
    return found


def _parts(text: str, known: Sequence[str]) -> list[str]:
    """`text` cut at commas; where names are known, at those that a name and "=" follow, and not within a name."""
    if not known:
        return [part for part in text.split(",") if part]
    names = "|".join(re.escape(name) for name in _longest(known))
    name, cut = re.compile(rf"\s*(?:{names})="), re.compile(rf",\s*(?=(?:{names}|[^\W\d]\w*)=)")
    parts, start, text = list[str](), 0, text.rstrip(", ")
    while start < len(text):
        found = name.match(text, start)
        comma = cut.search(text, found.end() if found else start)
        parts.append(text[start : comma.start() if comma else len(text)].strip())
        start = comma.end() if comma else len(text)
    return parts


def _longest(known: Sequence[str]) -> list[str]:
    return sorted(known, key=len, reverse=True)


def names(text: str, known: Sequence[str]) -> list[str]:
    """``name,…`` as names; one that is `known` may hold commas."""
    pieces, found = [piece.strip() for piece in text.split(",")], []
    while pieces:
        whole = next(
            (n for n in range(len(pieces), 0, -1) if ", ".join(pieces[:n]) in known or ",".join(pieces[:n]) in known), 1
        )
        name = ", ".join(pieces[:whole]) if ", ".join(pieces[:whole]) in known else ",".join(pieces[:whole])
        if name:
            found.append(name)
        pieces = pieces[whole:]
    return found
