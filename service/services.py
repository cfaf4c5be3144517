"""What handlers work with: the parts of a running service, as one typed and frozen value."""

from dataclasses import dataclass

from starlette.requests import Request

from runtime.models.config import ModelConfig
from service.catalog.catalog import Catalog
from service.door.bodies import Bodies
from service.engine.client import EngineClient
from service.grammars.grammars import Grammars
from service.ingest.imports import Imports
from service.ingest.sources import Sources
from service.kv.prefixes import Prefixes
from service.metrics import Metrics
from service.openai.prompts import PromptEncoder
from service.responses.store import ResponseStore
from service.routing.heads import PrefixHeads
from service.settings import Settings
from service.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts of a running service. Only handlers see it whole; everything else gets the parts that it needs."""

    settings: Settings
    started_at: float  # seconds since 1970
    model: ModelConfig  # of the base
    metrics: Metrics
    engine: EngineClient
    catalog: Catalog
    sources: Sources
    imports: Imports
    tokenizer: Tokenizer
    prompts: PromptEncoder
    grammars: Grammars
    prefixes: Prefixes
    responses: ResponseStore
    bodies: Bodies
    heads: PrefixHeads | None  # None: nobody asks for them
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
