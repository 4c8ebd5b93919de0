"""The rows of a JSONL, JSON, CSV or Parquet file, as dicts of column to value. Knows no problems."""

import csv
import io
import json
from pathlib import Path

from kvlib.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: Path) -> list[dict]:
    """The rows of a table with named columns. Raises ConfigError saying which file, which line, and the next step."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path} is of no known format; use one of {', '.join(SUFFIXES)}")
    try:
        rows = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    if not rows:
        raise ConfigError(f"{path} has no rows; give a file with at least one problem")
    return rows


def _read_text(path: Path, suffix: str) -> list[dict]:
    text = path.read_bytes().decode("utf-8-sig")  # read_text would make other signs of line ends that cells may hold
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = list(table)
            _refuse_twice([(name, None) for name in table.fieldnames or () if name])
        except ValueError as error:
            raise ConfigError(f"{path}: {error}; its values would hide one another, so rename or remove one") from error
        except csv.Error as error:
            raise ConfigError(f"{path}:{table.line_num} is not valid CSV ({error}); export the table again") from error
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise ConfigError(f"{path}: row {number} has not as many fields as the header; quote fields that "
                                  "hold commas")  # fmt: skip
        return rows
    # Not splitlines(), which also breaks at signs that may stand inside a cell or a JSON string.
    lines = [text] if suffix == ".json" else text.split("\n")
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(json.loads(line, object_pairs_hook=_refuse_twice))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number} is not valid JSON ({error})") from error
    if suffix == ".json":
        entries = entries[0] if entries else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        wanted = "a list of objects" if suffix == ".json" else "one object a line"
        raise ConfigError(f"{path} does not hold {wanted}; write each problem as an object with named fields")
    return entries


def _refuse_twice(pairs: list[tuple]) -> dict:
    """The pairs as a dict. Raises ValueError for a name that is given twice, of which the last would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _read_parquet(path: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} is Parquet, which needs the package pyarrow; pip install 'kvlib[math]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is not valid Parquet ({str(error).splitlines()[0]}); fetch it again") from error
