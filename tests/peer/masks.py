"""What of llama.cpp's own tests is not asked of a stand-in, what protection refuses, and why."""

from __future__ import annotations

_VISION = "needs a model that sees"
_HUB = "asks a host of the internet"
_WORDS = "words that stories260K says"
_COUNTS = "tokens of the original model's vocabulary"
_SHORTER = "its prompt has fewer tokens in the stand-in's vocabulary, and fits"

#: Regular expression of a test's name, "file::test" -> why it is skipped.
SKIPPED = {
    r"test_vision_api::.*": _VISION,
    r"test_compat_anthropic::.*(vision|image).*": _VISION,
    r"test_slot_save::.*(image|multimodal|mmproj).*": _VISION,
    r"test_rerank::.*": "needs a model that ranks",
    r"test_infill::.*": "needs a vocabulary with tokens for infilling",
    r"test_security::test_local_media_file\[.*": _VISION,
    r"test_embedding::test_embedding_error_prompt_too_long": "needs a model that reads a prompt in one batch",
    r"test_basic::test_load_split_model": _HUB,
    r"test_proxy::test_mcp_proxy": _HUB,
    r"test_tools_builtin::test_tools_builtin_grep_search": "searches a folder, and this one is ignored by git",
    r"test_router::test_router_(remote_preset|download_model|delete_model)": _HUB,
    r"test_basic::test_no_ui": "this llama-server is built without its page",
    r"test_security::test_access_static_assets_without_api_key": "this llama-server is built without its page",
    r"test_completion::test_nocache_long_input_prompt": _SHORTER,
    r"test_ctx_shift::test_ctx_shift_(enabled|disabled_long_prompt)": _SHORTER,
}

#: Regular expression of a test's name -> why it fails under protection, and is to.
REFUSED = {
    r"test_speculative::test_with_ctx_shift": "the context is not shifted (`llama_memory_can_shift` says no)",
}

#: (regular expression of "file::test", that of a whole line) -> why the line is masked.
MASKED = {
    (r"test_completion\.py::.*", r"assert match_regex\(.*\)"): _WORDS,
    (r"test_completion\.py::test_completion(_stream)?", r"assert .*\[\"prompt_n\"\] == n_prompt"): _COUNTS,
    (r"test_completion\.py::test_completion_prompt_cache", r"assert .*\[\"cache_n\"\] == n_prompt"): _COUNTS,
    (r"test_chat_completion\.py::test_chat_completion(_stream)?", r"assert match_regex\(re_content, .*\).*"): _WORDS,
    (r"test_chat_completion\.py::test_chat_completion_with_openai_library", r"assert match_regex\(.*\)"): _WORDS,
    (r"test_chat_completion\.py::test_chat_completion(_stream)?", r"assert .* == n_prompt"): _COUNTS,
    (r"test_chat_completion\.py::test_chat_completion_cached_tokens", r"assert .* == n_(prompt|cache)"): _COUNTS,
    (r"test_chat_completion\.py::test_return_progress", r"assert total_batch_count == batch_count"): _COUNTS,
    (r"test_compat_oai_responses\.py::.*", r"assert match_regex\(.*\)"): _WORDS,
    (r"test_ctx_shift\.py::test_ctx_shift_disabled_short_prompt", r"assert .* == n_token_output"): _COUNTS,
    (r"test_embedding\.py::test_embedding_pooling_none", r"assert .* == 5 .*"): _COUNTS,
    (r"test_embedding\.py::test_embedding_usage_.*", r"assert .* == (n_tokens|2 \* 9)"): _COUNTS,
    (r"test_lora\.py::test_lora(_per_request)?", r"assert match_regex\(.*\)"): _WORDS,
    (r"test_slot_save\.py::.*", r"assert match_regex\(.*\)"): _WORDS,
    (r"test_slot_save\.py::.*", r"assert .* == (84|21|6)( .*)?"): _COUNTS,
    (r"test_speculative\.py::test_multi_requests_parallel", r"assert match_regex\(.*\)"): _WORDS,
}
