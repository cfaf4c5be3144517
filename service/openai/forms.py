"""What an answer must look like, in the dialects of OpenAI, vLLM and SGLang."""

from service.errors import RequestError
from service.grammars.grammars import Grammars
from service.grammars.source import Source
from service.grammars.tags import StructuralTag
from service.openai.schemas import GenerationRequest, JsonObject, JsonSchema, StructuredOutputs


async def grammar_of(body: GenerationRequest, grammars: Grammars) -> str | None:
    """The grammar that a request asks for, if any. Raises RequestError naming the field."""
    source = source_of(body)
    return None if source is None else await grammars.translate(source)


def source_of(body: GenerationRequest) -> Source | None:
    """The one field of a request that says what the answer must look like. Raises RequestError if there are several."""
    asked = [*_response_format(body), *_structured_outputs(body.structured_outputs), *_named(body)]
    if len(asked) > 1:
        names = " and ".join(source.field for source in asked)
        message = f"{names} each say what the answer must look like: send one of them"
        raise RequestError("invalid_field", message, asked[1].field)
    return asked[0] if asked else None


def _named(body: GenerationRequest) -> list[Source]:
    """The fields of older vLLM and of SGLang."""
    sources = [
        Source("guided_json", "json_schema", body.guided_json),
        Source("guided_regex", "regex", body.guided_regex),
        Source("guided_choice", "choice", body.guided_choice),
        Source("guided_grammar", "grammar", body.guided_grammar),
        Source("json_schema", "json_schema", body.json_schema),
        Source("regex", "regex", body.regex),
        Source("ebnf", "grammar", body.ebnf),
        Source("structural_tag", "structural_tag", body.structural_tag),
    ]
    return [source for source in sources if source.content is not None]


def _structured_outputs(asked: StructuredOutputs | None) -> list[Source]:
    if asked is None:
        return []
    sources = [
        Source("structured_outputs.json", "json_schema", asked.json),
        Source("structured_outputs.json_object", "json_schema", {"type": "object"} if asked.json_object else None),
        Source("structured_outputs.regex", "regex", asked.regex),
        Source("structured_outputs.choice", "choice", asked.choice),
        Source("structured_outputs.grammar", "grammar", asked.grammar),
        Source("structured_outputs.structural_tag", "structural_tag", asked.structural_tag),
    ]
    found = [source for source in sources if source.content is not None]
    if not found:
        fields = ", ".join(source.field.partition(".")[2] for source in sources)
        raise RequestError("invalid_field", f"structured_outputs needs one of {fields}", "structured_outputs")
    return found


def _response_format(body: GenerationRequest) -> list[Source]:
    match body.response_format:
        case JsonSchema(json_schema=described):
            field = "response_format.json_schema.schema"
            return [Source(field, "json_schema", {} if described.schema is None else described.schema)]
        case JsonObject():
            return [Source("response_format", "json_schema", {"type": "object"})]
        case StructuralTag() as tag:
            return [Source("response_format", "structural_tag", tag)]
    return []
