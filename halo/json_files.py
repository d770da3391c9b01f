"""JSON as it is found: every file of it is read here, checked against a type, and refused in one line.

read_json(path, dict[str, Any], "copy it again")
read_json(folder / "stage.json", Record, "remove the folder")    # a dataclass, a TypedDict or a pydantic model
"""

import codecs
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from halo.errors import UserError, first_line
from halo.tables import adapter

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_json(path: Path, kind: Any, then: str) -> Any:
    """The content of a file of JSON.

    Args:
        kind: its type; each value must be of it, and none is converted.
        then: what to do where it is damaged, for the line's end.

    Raises:
        UserError: it cannot be read, or as `parse_json`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {then}") from error
    return parse_json(content, kind, path, then)


def parse_json(content: bytes, kind: Any, where: object, then: str) -> Any:
    """The same of what a file named `where` holds.

    Raises:
        UserError: it is no JSON, or cut off, or a page of a website, or in another encoding; or not of this type.
    """
    if content.startswith(_BYTE_ORDER_MARKS):
        raise UserError(f"{where} begins with a byte-order mark: save it as UTF-8 without one")
    if not content.strip():
        raise UserError(f"{where} is empty: {then}")
    if content.lstrip().startswith(b"<"):
        raise UserError(f"{where} is a page of a website, not JSON: download the file itself")
    try:
        return adapter(kind).validate_json(content.decode(), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["type"] == "json_invalid":
            reason = fault["msg"].removeprefix("Invalid JSON: ")
            raise UserError(f"{where} is not valid JSON, or cut off: {reason}: {then}") from None
        problem = _problem(error) if fault["loc"] else "its JSON is no table of keys"
        raise UserError(f"{where} is not valid: {problem}: {then}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid JSON, or cut off: {first_line(error)}: {then}") from error


def mismatch(value: Any, kind: Any) -> str:
    """Why a value that was read is not of a type, with its place; empty if it is. Here a type may convert."""
    try:
        adapter(kind).validate_python(value)
    except ValidationError as error:
        return _problem(error)
    return ""


def _problem(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
