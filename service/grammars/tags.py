"""Structural tags as clients write them: free text in which a tag, once it is begun, has a form.

Two layouts: vLLM's and SGLang's older one (`structures`, `triggers`) and XGrammar's (`format`), of whose formats these
are built; a client that sends another, or another keyword of these, is told so.
"""

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Triggers = Annotated[list[Text], Meta(min_length=1)]


class Format(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A part of an answer."""


class ConstStringFormat(Format, frozen=True, kw_only=True, tag="const_string"):
    value: str


class JsonSchemaFormat(Format, frozen=True, kw_only=True, tag="json_schema"):
    json_schema: dict[str, Any] | bool


class RegexFormat(Format, frozen=True, kw_only=True, tag="regex"):
    pattern: str


class GrammarFormat(Format, frozen=True, kw_only=True, tag="grammar"):
    grammar: str  # GBNF or Lark


class AnyTextFormat(Format, frozen=True, kw_only=True, tag="any_text"):
    """Any text; in a tag, up to the tag's end."""


class SequenceFormat(Format, frozen=True, kw_only=True, tag="sequence"):
    elements: Annotated[list["AnyFormat"], Meta(min_length=1)]


class OrFormat(Format, frozen=True, kw_only=True, tag="or"):
    elements: Annotated[list["AnyFormat"], Meta(min_length=1)]


class TagFormat(Format, frozen=True, kw_only=True, tag="tag"):
    begin: str
    content: "AnyFormat"
    end: str | Annotated[list[str], Meta(min_length=1)]  # one of several


class ListedTag(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tag of a list of tags, which need not say that it is one."""

    begin: Text
    content: "AnyFormat"
    end: str | Annotated[list[str], Meta(min_length=1)]
    type: Literal["tag"] = "tag"


Tags = Annotated[list[ListedTag], Meta(min_length=1)]


class TriggeredTagsFormat(Format, frozen=True, kw_only=True, tag="triggered_tags"):
    """Free text in which one of the tags must follow as soon as a trigger, the beginning of its own, is written."""

    triggers: Triggers
    tags: Tags
    at_least_one: bool = False  # the answer begins with a tag
    stop_after_first: bool = False


class SeparatedTagsFormat(Format, frozen=True, kw_only=True, tag="tags_with_separator"):
    """Tags and nothing else, with the separator between two."""

    tags: Tags
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


AnyFormat = Union[  # noqa: UP007 -- a string of it is resolved
    ConstStringFormat,
    JsonSchemaFormat,
    RegexFormat,
    GrammarFormat,
    AnyTextFormat,
    SequenceFormat,
    OrFormat,
    TagFormat,
    TriggeredTagsFormat,
    SeparatedTagsFormat,
]


class Structure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tag of the older layout."""

    begin: Text
    end: str
    schema: dict[str, Any] | bool | None = None  # None: any JSON


class StructuralTag(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="structural_tag"
):
    """Either `format`, or `structures` and `triggers`."""

    format: AnyFormat | None = None
    structures: Annotated[list[Structure], Meta(min_length=1)] | None = None
    triggers: Triggers | None = None
    at_least_one: bool | None = None  # of the older layout, as SGLang has it
