"""The fields of other servers' APIs: built, refused by name or harmless; and values that others are lenient about."""

import json
from typing import Any

import pytest

from service.openai.known_fields import IGNORED, REFUSED
from service.openai.sampling_params import sampling_params, stop_strings
from service.openai.schemas import HARMLESS, ChatRequest, CompletionRequest
from tests.service.live_server import LiveServer

# What each server's source or reference names as fields of a request, by server and call.
OPENAI_BOTH = (
    "model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options "
    "temperature top_p user"
)
OPENAI_CHAT = (
    "messages audio function_call functions max_completion_tokens metadata modalities parallel_tool_calls prediction "
    "prompt_cache_key prompt_cache_retention reasoning_effort response_format safety_identifier service_tier store "
    "tool_choice tools top_logprobs verbosity web_search_options"
)
OPENAI_COMPLETION = "prompt best_of echo suffix"
VLLM_BOTH = (
    "use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids "
    "include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens "
    "truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo "
    "add_special_tokens response_format structured_outputs guided_json guided_regex guided_choice guided_grammar "
    "guided_decoding_backend guided_whitespace_pattern structural_tag logits_processors early_stopping priority "
    "request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start "
    "return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs "
    "repetition_detection thinking_token_budget stream_interval"
)
VLLM_CHAT = (
    "best_of include_reasoning add_generation_prompt continue_final_message documents chat_template "
    "chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text"
)
VLLM_COMPLETION = "prompt_embeds"
SGLANG_BOTH = (
    "return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details "
    "return_token_ids top_k min_p min_tokens regex ebnf json_schema repetition_penalty stop_token_ids stop_regex "
    "no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params response_format custom_params "
    "custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank "
    "disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority custom_labels "
    "max_new_tokens min_new_tokens sampling_seed return_logprob logprob_start_len top_logprobs_num token_ids_logprob "
    "return_text_in_logprobs text input_ids input_embeds image_data video_data audio_data"
)
SGLANG_CHAT = (
    "return_prompt_token_ids return_meta_info task continue_final_message separate_reasoning stream_reasoning "
    "chat_template_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video reasoning"
)
LLAMA_CPP_BOTH = (
    "timings_per_token stream stream_options cache_prompt return_tokens return_progress max_tokens n_predict n_indent "
    "n_keep n_discard n_cmpl n_cache_reuse t_max_prompt_ms t_max_predict_ms response_fields top_k top_p min_p "
    "top_n_sigma xtc_probability xtc_threshold typical_p temperature dynatemp_range dynatemp_exponent repeat_last_n "
    "repeat_penalty frequency_penalty presence_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n "
    "dry_sequence_breakers mirostat mirostat_tau mirostat_eta adaptive_target adaptive_decay seed n_probs min_keep "
    "backend_sampling post_sampling_probs speculative.n_min speculative.n_max speculative.p_min speculative.type "
    "speculative.ngram_size_n speculative.ngram_size_m speculative.ngram_m_hits logprobs lora json_schema grammar "
    "grammar_lazy chat_format reasoning_format thinking_forced_open parse_tool_calls chat_parser preserved_tokens "
    "grammar_triggers reasoning_budget_tokens reasoning_budget_start_tag reasoning_budget_end_tag "
    "reasoning_budget_message reasoning_budget_arm_immediately logit_bias ignore_eos stop samplers id_slot "
    "multimodal_data penalize_nl tfs_z system_prompt"
)
TGI_BOTH = (
    "inputs parameters adapter_id best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p "
    "do_sample max_new_tokens return_full_text stop truncate watermark details decoder_input_details seed "
    "top_n_tokens grammar stop_sequences"
)
TGI_CHAT = "tool_prompt guideline"
TRANSFORMERS_BOTH = "no_repeat_ngram_size num_beams max_length"
# Fields of ours that a completion has too, though other servers know them in chats only, and the reverse
CHAT_ONLY = {"best_of"}

BOTH = (OPENAI_BOTH, VLLM_BOTH, SGLANG_BOTH, LLAMA_CPP_BOTH, TGI_BOTH, TRANSFORMERS_BOTH)
KNOWN: dict[type, set[str]] = {
    ChatRequest: set(" ".join((*BOTH, OPENAI_CHAT, VLLM_CHAT, SGLANG_CHAT, TGI_CHAT)).split()),
    CompletionRequest: set(" ".join((*BOTH, OPENAI_COMPLETION, VLLM_COMPLETION)).split()),
}
BASE = {CompletionRequest: {"prompt": "hello"}, ChatRequest: {"messages": [{"role": "user", "content": "hello"}]}}


@pytest.mark.parametrize("kind", KNOWN)
def test_every_field_that_others_know_is_built_refused_or_harmless(kind: type) -> None:
    decided = {*kind.__struct_fields__, *REFUSED, *IGNORED}
    assert KNOWN[kind] - decided - CHAT_ONLY == set()


def test_a_field_is_decided_once() -> None:
    built = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert REFUSED.keys() & built == set()
    assert REFUSED.keys() & IGNORED == set()
    assert HARMLESS.keys() <= built


def ask(server: LiveServer, kind: type, **fields: Any) -> tuple[int, dict[str, Any]]:
    path = "/v1/completions" if kind is CompletionRequest else "/v1/chat/completions"
    response = server.post(path, model="tiny", max_tokens=2, **BASE[kind], **fields)
    return response.status_code, response.json().get("error", {})


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_would_change_the_answer_is_refused_unless_it_asks_for_nothing(
    server: LiveServer, field: str, kind: type
) -> None:
    status, error = ask(server, kind, **{field: "something"})
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)
    assert error["message"].startswith(f"{field} is not supported: ")
    for value in (None, *REFUSED[field].harmless):
        assert ask(server, kind, **{field: value})[0] == 200


def test_a_field_that_has_another_name_here_says_which(server: LiveServer) -> None:
    _, error = ask(server, CompletionRequest, max_new_tokens=5)
    assert error["message"] == "max_new_tokens is not supported: use max_tokens"
    assert server.post("/invocations", prompt="x", max_new_tokens=5).json()["error"]["param"] == "max_new_tokens"


def test_fields_that_change_no_answer_are_ignored_whatever_they_say(server: LiveServer) -> None:
    for value in (1, "x", [{}], {"a": None}):
        fields = dict.fromkeys(IGNORED - {*ChatRequest.__struct_fields__}, value)
        assert ask(server, CompletionRequest, **fields, nobody_knows=value)[0] == 200


def test_a_number_that_no_float_can_hold_is_refused_in_any_field(server: LiveServer) -> None:
    for field in ("custom_params", "max_tokens"):
        response = server.client.post(
            "/v1/completions", content=f'{{"model": "tiny", "prompt": "x", "n": 1.0, "{field}": 1e999}}'
        )
        assert response.status_code == 400
        assert "out of range" in response.json()["error"]["message"]


def test_a_whole_number_may_have_a_point(server: LiveServer) -> None:
    """As pydantic takes them: JavaScript and spreadsheets do not tell 5.0 from 5."""
    content = json.dumps({"model": "tiny", "prompt": [5.0, 7.0], "max_tokens": 3.0, "temperature": 1, "seed": 1e2})
    response = server.client.post("/v1/completions", content=content)
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 3)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2.0, "top_logprobs": 1.0}
    answer = server.post("/v1/chat/completions", model="tiny", logprobs=True, **chat)
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert server.post("/detokenize", tokens=[5.0]).json() == server.post("/detokenize", tokens=[5]).json()


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_chat_of_no_tokens_is_refused_as_openai_refuses_it(server: LiveServer, field: str) -> None:
    response = server.post("/v1/chat/completions", model="tiny", **BASE[ChatRequest], **{field: 0})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert ">= 1" in error["message"]


@pytest.mark.parametrize("stop", ["", [""], ["", ""]])
@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_stop_string_stops_nothing(server: LiveServer, stop: object, stream: bool) -> None:
    response = server.complete("hello world", max_tokens=4, stop=stop, stream=stream)
    assert response.status_code == 200
    if not stream:
        assert response.json()["choices"][0]["text"] == "hello worldhello world"
    assert server.complete("hello world", max_tokens=4, stop=["", " wo"]).json()["choices"][0]["text"] == "hello"


def test_empty_stop_strings_are_left_out() -> None:
    assert stop_strings(CompletionRequest(model="m", prompt="x", stop=["", "a", ""])) == ("a",)
    assert stop_strings(CompletionRequest(model="m", prompt="x", stop="")) == ()


@pytest.mark.parametrize("temperature", [None, 0.0, 1.7])
def test_a_nucleus_of_nothing_is_the_likeliest_token(server: LiveServer, temperature: float | None) -> None:
    body = CompletionRequest(model="m", prompt="x", top_p=0, temperature=temperature, presence_penalty=1.5)
    params = sampling_params(body, 5, None, 100, None, server.services.tokenizer)
    assert (params.temperature, params.top_p, params.presence_penalty) == (0.0, 1.0, 1.5)
