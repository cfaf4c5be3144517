"""The operations whose bodies have the most forms."""

GENERATIONS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/invocations")
