"""Tables in CSV: a row for each picture."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from metaft.errors import DataError, suggest
from metaft.support.names import is_text


def rows(
    file: Path, needed: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> value) of each row. `needed` has a column's name here -> those that it may have in the first
    line; `optional` ones are there or not.

    Raises DataError that names the file, the line and what is wrong there: a column that is missing, there twice
    (also by another name) or nearly an optional one by its name, a value that is empty, not text, or of no column.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            has = table.fieldnames or ()
            columns = {name: _one_of(file, has, names) for name, names in needed.items()}
            columns |= {name: name for name in optional if name in has}
            _check_names(file, has, set(columns.values()), optional)
            for row in table:
                yield table.line_num, _values(f"{file}, line {table.line_num}", row, columns)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no table in UTF-8 ({error})") from None


def unread(file: Path, known: Collection[str]) -> list[str]:
    """The columns of a table that `rows` could read which are none of these."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return [name for name in csv.DictReader(stream).fieldnames or () if name not in known]


def _one_of(file: Path, has: Sequence[str], names: Sequence[str]) -> str:
    """The column that has one of these names. Raises DataError where none or several have."""
    there = [name for name in names if name in has]
    if not there:
        either, held = " or ".join(map(repr, names)), ", ".join(has) or "nothing"
        raise DataError(f"{file} has no column {either} in its first line, which holds {held}")
    if len(there) > 1:
        raise DataError(f"{file} has columns {' and '.join(map(repr, there))}, which say the same; leave one of them")
    return there[0]


def _check_names(file: Path, has: Sequence[str], used: Collection[str], optional: Sequence[str]) -> None:
    """Raises DataError for a column that stands there twice, and for one that nobody reads and whose name is nearly
    that of an optional one."""
    for name in used:
        if has.count(name) > 1:
            raise DataError(f"{file} has {has.count(name)} columns {name!r} in its first line")
    for name in has:
        if name not in used and (meant := suggest(name, set(optional).difference(used), cutoff=0.75)):
            raise DataError(f"{file}: column {name!r} is none of {', '.join(sorted({*used, *optional}))}{meant}")


def _values(where: str, row: Mapping[str | None, str | None], columns: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for name, column in columns.items():
        value = (row.get(column) or "").strip()
        if not value:
            raise DataError(f"{where}: {column} is empty")
        if not is_text(value):
            raise DataError(f"{where}: {column} {value!r} is not text")
        if len(value.splitlines()) > 1:
            raise DataError(f"{where}: {column} goes over several lines, {value!r:.80}; is a quote left open?")
        values[name] = value
    if None in row:
        raise DataError(f"{where}: more values than columns; put quotes around a value with a comma")
    return values
