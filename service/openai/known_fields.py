"""The fields that clients of other servers send: each is built here, refused by name, or changes no answer.

What is built is a field of a Struct in `schemas`. Of the rest, a field that would change the answer is in `REFUSED`,
and one that would not is in `IGNORED`. A test holds the three complete for OpenAI, vLLM, SGLang, llama.cpp and TGI.
"""

from typing import Any, NamedTuple, TypeVar

import msgspec

from service.errors import RequestError
from service.http import decode_json
from service.openai.schemas import GenerationRequest, asks_for_nothing

Body = TypeVar("Body", bound=GenerationRequest)


class Refused(NamedTuple):
    """A field that is not built."""

    harmless: tuple[Any, ...] = ()  # the values besides null that ask for nothing
    instead: str = ""  # what does the same here


SWITCH = Refused((False,))
REFUSED = {
    # other samplers, and other names of ours
    "max_new_tokens": Refused(instead="max_tokens"),
    "min_new_tokens": Refused((0,), "min_tokens"),
    "max_length": Refused(instead="max_tokens"),
    "n_predict": Refused((-1,), "max_tokens"),
    "n_cmpl": Refused((1,), "n"),
    "do_sample": Refused((True,), "temperature: 0"),
    "sampling_seed": Refused(instead="seed"),
    "stop_sequences": Refused(([],), "stop"),
    "stop_regex": Refused(([], "")),
    "no_stop_trim": Refused((False,), "include_stop_str_in_output"),
    "repeat_penalty": Refused((1,), "repetition_penalty"),
    "no_repeat_ngram_size": Refused((0,)),
    "num_beams": Refused((1,)),
    "length_penalty": Refused((1,)),
    "early_stopping": SWITCH,
    "typical_p": Refused((1,)),
    "tfs_z": Refused((1,)),
    "top_n_sigma": Refused((-1,)),
    "min_keep": Refused((0, 1)),
    "mirostat": Refused((0,)),
    "mirostat_mode": Refused((0,)),
    "dry_multiplier": Refused((0,)),
    "xtc_probability": Refused((0,)),
    "dynatemp_range": Refused((0,)),
    "adaptive_target": Refused((-1,)),
    "penalize_nl": SWITCH,
    "samplers": Refused(([],)),
    "watermark": SWITCH,
    "watermarking": SWITCH,
    "repetition_detection": Refused(),
    "logits_processors": Refused(([],)),
    "custom_logit_processor": Refused(([],)),
    "custom_params": Refused(({},)),
    "vllm_xargs": Refused(({},)),
    "thinking_token_budget": Refused((-1,)),
    "reasoning_budget_tokens": Refused((-1,)),
    "t_max_prompt_ms": Refused((0, -1)),
    "t_max_predict_ms": Refused((0, -1)),
    "n_indent": Refused((0,)),
    # what the answer must look like
    "grammar": Refused(("",), "structured_outputs.grammar"),
    "grammar_lazy": SWITCH,
    "grammar_triggers": Refused(([],)),
    "chat_parser": Refused(),
    "parse_tool_calls": Refused((True,)),
    "thinking_forced_open": SWITCH,
    "verbosity": Refused(("medium",)),
    # the prompt
    "inputs": Refused(instead="prompt"),
    "parameters": Refused(({},), "its fields themselves"),
    "text": Refused(instead="prompt"),
    "input_ids": Refused(instead="prompt in /v1/completions, which takes token ids"),
    "input_embeds": Refused(),
    "image_data": Refused(([],)),
    "video_data": Refused(([],)),
    "audio_data": Refused(([],)),
    "multimodal_data": Refused(([],)),
    "system_prompt": Refused(("",), "a message of the role system"),
    "tool_prompt": Refused(("",)),
    "guideline": Refused(("",)),
    "task": Refused(),
    "truncate": Refused(instead="truncate_prompt_tokens"),
    "truncation_side": Refused(("left",)),
    # what the answer tells besides the text
    "n_probs": Refused((0,), "logprobs"),
    "post_sampling_probs": SWITCH,
    "logprob_token_ids": Refused(),
    "return_logprob": Refused((False,), "logprobs"),
    "top_logprobs_num": Refused((0,), "logprobs"),
    "top_n_tokens": Refused((0,), "logprobs"),
    "logprob_start_len": Refused((-1,)),
    "token_ids_logprob": Refused(),
    "return_full_text": Refused((False,), "echo"),
    "return_tokens": Refused((False,), "return_token_ids"),
    "return_prompt_token_ids": Refused((False,), "return_token_ids"),
    "return_prompt_text": SWITCH,
    "return_hidden_states": SWITCH,
    "return_routed_experts": SWITCH,
    "return_cached_tokens_details": SWITCH,
    "return_meta_info": SWITCH,
    "response_fields": Refused(([],)),
    "details": SWITCH,
    "decoder_input_details": SWITCH,
    # the adapter, and K/V of other servers
    "lora": Refused(([],), "model or lora_path"),
    "session_params": Refused(({},)),
    "extra_key": Refused(("",), "cache_salt"),
    "kv_transfer_params": Refused(({},)),
    "ec_transfer_params": Refused(({},)),
    "bootstrap_host": Refused(),
    "bootstrap_port": Refused(),
    "bootstrap_room": Refused(),
}

IGNORED = frozenset(
    {
        # names of the client's own, and where a server keeps things
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "request_id", "rid", "session_id", "custom_labels"),
        # when and where a request is computed, and how its answer is cut into events
        *("priority", "id_slot", "routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"),
        *("cache_prompt", "n_cache_reuse", "n_keep", "n_discard", "backend_sampling", "stream_interval"),
        *("return_progress", "timings_per_token", "guided_decoding_backend", "ngram_corpus_id"),
        *("speculative.n_max", "speculative.n_min", "speculative.p_min", "speculative.type"),
        *("speculative.ngram_size_n", "speculative.ngram_size_m", "speculative.ngram_m_hits"),
        # settings of what is refused or absent itself: images, samplers, routed experts, rendered prompts
        *("mm_processor_kwargs", "media_io_kwargs", "images_config", "max_dynamic_patch", "min_dynamic_patch"),
        *("use_audio_in_video", "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length"),
        *("dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "adaptive_decay"),
        *("repeat_last_n", "preserved_tokens", "chat_format", "reasoning_budget_start_tag", "reasoning_budget_end_tag"),
        *("reasoning_budget_message", "reasoning_budget_arm_immediately", "routed_experts_prompt_start"),
        *("routed_experts_start_len", "return_token_offsets", "return_mm_kwargs", "return_text_in_logprobs"),
        # reasoning, which is told in its own field as it comes; in a completion it is part of the text
        *("reasoning", "reasoning_format"),
        *("stream_reasoning", "chat_template_content_format"),
    }
)

# Decoding into it skips all other fields of a body without keeping them
RefusedFields = msgspec.defstruct("RefusedFields", [(name, Any, None) for name in REFUSED], frozen=True)


def decode_request(content: bytes, kind: type[Body]) -> Body:
    """Decode the body of a generation. Raises RequestError, also for a field in `REFUSED` that asks for something.

    A field that the kind of body has itself is not refused.
    """
    body, found = decode_json(content, kind), decode_json(content, RefusedFields)
    for name, refused in REFUSED.items():
        value = getattr(found, name)
        if name not in kind.__struct_fields__ and not asks_for_nothing(value, refused.harmless):
            instead = f": use {refused.instead}" if refused.instead else ": leave it out"
            raise RequestError("unsupported_parameter", f"{name} is not supported{instead}", name)
    return body
