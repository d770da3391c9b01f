"""The JSON schema of presets, for editors: completion, types, and the line that explains a key.

    python -m halo.schema      # writes halo/presets/preset.schema.json anew, after a change of halo/config.py

A preset names it in its first line, `#:schema ./preset.schema.json`, which taplo and Even Better TOML read.
"""

import json
from typing import Any, get_type_hints

from halo.config import Config
from halo.options import attribute_docs
from halo.preset import PRESETS
from halo.tables import adapter, table_class

SCHEMA = PRESETS / "preset.schema.json"


def preset_schema() -> dict[str, Any]:
    """The schema. No key is required, because a preset may have it from its base or from the command line."""
    schema = adapter(Config).json_schema()
    tables = schema.pop("$defs")
    _describe(schema, Config)
    _describe_tables(tables, Config)
    base = {"description": "The shipped preset that this one changes.", "type": "string"}
    properties = {"base": base} | schema["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **(schema | {"title": "HypeNet-HALO preset", "properties": properties}),
        "$defs": tables,
    }


def _describe_tables(tables: dict[str, Any], cls: Any) -> None:
    """Complete the schemas of all dataclasses that a dataclass holds."""
    for kind in get_type_hints(cls).values():
        table = table_class(kind)
        if table:
            _describe(tables[table.__name__], table)
            _describe_tables(tables, table)


def _describe(schema: dict[str, Any], cls: Any) -> None:
    """Complete one dataclass's schema: refuse other keys, require none, and explain each."""
    docs = attribute_docs(cls)
    schema["additionalProperties"] = False
    schema.pop("required", None)
    schema["description"] = " ".join((cls.__doc__ or "").split())
    for name, of_key in schema["properties"].items():
        of_key.pop("title", None)
        if "anyOf" in of_key:  # a table or None; TOML has no None
            of_key |= of_key.pop("anyOf")[0]
            del of_key["default"]
        of_key["description"] = docs[name]


def schema_text() -> str:
    """The schema as the file has it."""
    return json.dumps(preset_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
