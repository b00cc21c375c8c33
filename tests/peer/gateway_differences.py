"""What of llama.cpp's own tests passes against llama-server and not through the gateway, and why."""

from __future__ import annotations

_NATIVE = "asks /completion, llama-server's own route, or for its form of an answer: the gateway has OpenAI's alone"
_CORS = "pages of other sites may not ask: there is no CORS"
_VERBOSE = "nothing of the engine's own answer is passed on (`__verbose`, `timings`, progress)"
_SLOTS = "/props and /slots do not exist: they show other users' prompts"

#: Regular expression of a test's name, "file::test" -> the reason.
DIFFERENCES: dict[str, str] = {
    r"test_basic::test_server_multiple_addresses": "the gateway listens at one address",
    r"test_basic::test_server_(props|slots)": _SLOTS,
    r"test_basic::test_server_model_aliases_and_tags": "the model has one name and no tags",
    r"test_chat_completion::test_(chat_template|verbose_debug)": _VERBOSE,
    r"test_chat_completion::test_chat_template_(assistant_prefill|continue_final_message_vllm_compat).*": _VERBOSE,
    r"test_chat_completion::test_(chat_completion_with_timings_per_token|return_progress.*)": _VERBOSE,
    r"test_chat_completion::test_chat_completions_multiple_choices": "`id_slot` is refused: slots are the gateway's",
    r"test_completion::(?!.*openai_library).*": _NATIVE,
    r"test_compat_anthropic::test_anthropic_messages_streaming": (
        "message_start goes out before the prompt is read; message_delta tells its tokens"
    ),
    r"test_compat_anthropic::test_anthropic_empty_messages": "no messages are refused, as Anthropic does",
    r"test_compat_anthropic::test_anthropic_thinking_history_.*": "reasoning of earlier turns is not read again",
    r"test_compat_oai_responses::test_responses_stream_with_llama_telemetry": _VERBOSE,
    r"test_security::test_correct_api_key.*": _NATIVE,
    r"test_template::test_add_generation_prompt.*-False\]": (
        "`add_generation_prompt` false is for going on with the assistant's last message, and refused elsewhere"
    ),
    r"test_security::test_openai_library_correct_api_key": "the client's base URL lacks /v1",
    r"test_security::test_cors_(options|origins).*": _CORS,
    r"test_security::test_cors_proxy_.*": "there is no proxy for pages",
}

#: Regular expression of a whole line -> why it is masked in both runs, so that the rest of its test counts.
MASKED: dict[str, str] = {
    r"assert .*system_fingerprint.*": "the engine's build is not told",
    r"assert .*\[\"error\"\]\[\"(n_prompt_tokens|n_ctx)\"\].*": "both numbers are in the message alone",
    r"assert .*cache_read_input_tokens.*": "what is cached tells what others asked",
}
