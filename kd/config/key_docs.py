"""What a recipe can hold: the schema as a table of keys, for `dae keys`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kd.config.data_recipe import SourceRecipe
from kd.config.in_memory_rows import InMemoryRows
from kd.config.schema import Frozen


@dataclass(frozen=True)
class KeyDoc:
    """One line of `dae keys`."""

    key: str
    type: str
    default: str
    meaning: str


def key_docs(schema: type[Frozen]) -> list[KeyDoc]:
    """Every key of a recipe with type, default and meaning, in the order of the schema; nested keys dotted."""
    docs = []
    for name, field in schema.model_fields.items():
        key, words = field.alias or name, type_words(field.annotation)
        if name == "routes":
            key, words = "ROUTE", "sources"
        docs.append(KeyDoc(key, words, default_words(field), field.description or ""))
        nested = nested_schema(field.annotation)
        if nested is not None and name != "eval":
            prefix = key + place_of_nested(field.annotation, nested)
            docs += [KeyDoc(f"{prefix}.{doc.key}", doc.type, doc.default, doc.meaning) for doc in key_docs(nested)]
    return docs


def place_of_nested(annotation: Any, nested: type[Frozen]) -> str:
    """How a key reaches what is nested in it: `.0` in lists of sources, `.NAME` in mappings."""
    if nested is SourceRecipe:
        return ".0"
    return ".NAME" if get_origin(annotation) is dict else ""


def nested_schema(annotation: Any) -> type[Frozen] | None:
    """The recipe inside a field's type, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        return annotation
    inside = (nested_schema(argument) for argument in get_args(annotation) if not isinstance(argument, str))
    return next((schema for schema in inside if schema is not None), None)


def type_words(annotation: Any) -> str:
    """A field's type as a user would say it."""
    simple = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_words(arguments[0])
    if annotation in simple:
        return simple[annotation]
    if get_origin(annotation) is Literal:
        return " | ".join(arguments)
    if nested_schema(annotation) is SourceRecipe:
        return "{name: sources}" if get_origin(annotation) is dict else "sources"
    if get_origin(annotation) is dict:
        return f"{{name: {type_words(arguments[1])}}}"
    if get_origin(annotation) is tuple:
        return f"list of {type_words(arguments[0])}"
    if arguments:
        return " | ".join(
            type_words(argument) for argument in arguments if innermost_type(argument) is not InMemoryRows
        )
    return "keys"


def innermost_type(annotation: Any) -> Any:
    """A field's type without what Annotated adds."""
    return innermost_type(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def default_words(field: FieldInfo) -> str:
    """A field's default as it would stand in a recipe."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    value = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
