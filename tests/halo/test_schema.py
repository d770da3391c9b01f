"""The JSON schema of presets: the file is what the code makes, and what ships follows it."""

from typing import Any

import pytest

from halo.options import settings
from halo.preset import PRESETS
from halo.schema import SCHEMA, preset_schema, schema_text
from halo.tables import read_toml

SHIPPED = sorted(PRESETS.glob("*.toml"))
TYPES = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict}


def faults(value: Any, schema: dict[str, Any], defs: dict[str, Any], key: str = "preset") -> list[str]:
    """Where a value breaks a schema; as far as preset_schema uses JSON Schema."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    expected = TYPES[schema["type"]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        return [f"{key} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{key} is none of {schema['enum']}"]
    found = []
    if isinstance(value, dict):
        for name, inner in value.items():
            others = schema.get("additionalProperties")
            of_key = schema.get("properties", {}).get(name, others)
            if of_key is False:
                found.append(f"{key}.{name} is unknown")
            elif isinstance(of_key, dict):
                found += faults(inner, of_key, defs, f"{key}.{name}")
    if isinstance(value, list):
        for inner in value:
            found += faults(inner, schema.get("items") or schema["prefixItems"][0], defs, key)
    return found


def faults_of(preset: dict[str, Any]) -> list[str]:
    return faults(preset, preset_schema(), preset_schema()["$defs"])


def test_the_file_is_what_the_code_makes():
    assert SCHEMA.read_text() == schema_text(), "run python -m halo.schema"


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda path: path.stem)
def test_every_preset_names_the_schema_and_follows_it(preset):
    assert preset.read_text().startswith(f"#:schema ./{SCHEMA.name}\n")
    assert faults_of(read_toml(preset)) == []


def test_the_schema_refuses_what_the_code_refuses():
    wrong = {
        "align": {"lrr": 1.0, "batch": 0.5, "clip": True, "schedule": "cosin"},
        "niah": {"lengths": [1, "x"]},
        "teacher": 3,
    }
    assert faults_of(wrong) == [
        "preset.align.lrr is unknown",
        "preset.align.batch is no integer",
        "preset.align.clip is no number",
        "preset.align.schedule is none of ['cosine', 'constant', 'wsd']",
        "preset.niah.lengths is no integer",
        "preset.teacher is no string",
    ]


def test_every_setting_is_in_the_schema_with_its_line():
    schema = preset_schema()
    for setting in settings():
        of_key = schema
        for part in setting.key.split("."):
            of_key = of_key["properties"][part]
            of_key = schema["$defs"][of_key["$ref"].rpartition("/")[2]] if "$ref" in of_key else of_key
        assert of_key["description"] == setting.doc
