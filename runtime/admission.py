"""Which requests an engine takes in."""

from runtime.messages import Generate


class RequestRefused(ValueError):
    """A request that cannot run; `code` is the stable word for why."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def check_request(command: Generate, max_model_len: int, vocab_size: int) -> None:
    """Raise RequestRefused for a request that no engine with these limits could run."""
    tokens, params = command.token_ids, command.params
    if not tokens:
        raise RequestRefused("empty_prompt", "the prompt has no tokens")
    if len(tokens) >= max_model_len:
        message = f"the prompt has {len(tokens)} tokens; at most {max_model_len - 1} leave room to answer"
        raise RequestRefused("context_length_exceeded", message)
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise RequestRefused("invalid_token_id", f"token ids must be between 0 and {vocab_size - 1}")
    if not 0 <= command.invocation_start <= len(tokens):
        message = f"an adapter's invocation must be between 0 and {len(tokens)}, not {command.invocation_start}"
        raise RequestRefused("invalid_invocation_start", message)
    if params.max_tokens < 1:
        raise RequestRefused("invalid_max_tokens", f"max_tokens must be at least 1, not {params.max_tokens}")
    if any(not 0 <= token < vocab_size for token in params.stop_token_ids):
        raise RequestRefused("invalid_token_id", f"stop_token_ids must be between 0 and {vocab_size - 1}")
