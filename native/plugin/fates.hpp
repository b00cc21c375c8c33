// Every function that llama.h exports, and what becomes of it in a program under protection. A test compares the list with
// llama.h: a function that is missing here fails it.
//
//   FOLLOWED   it goes on to llama.cpp, and the lockstep knows of it
//   LOCKED     it goes on where the context is none of a protected model's, or where what it gives was adjusted
//   REFUSED    it fails on a protected context, because protection could not follow
//   HARMLESS   it is left to llama.cpp: it neither feeds a context nor gives what follows from logits

#pragma once

// X(name, fate): the ones that the plugin defines.
#define ADL_GUARDED(X)                                                                                                           \
    X(llama_model_init_from_user, FOLLOWED)                                                                                      \
    X(llama_load_model_from_file, FOLLOWED)                                                                                      \
    X(llama_model_load_from_file, FOLLOWED)                                                                                      \
    X(llama_model_load_from_file_ptr, FOLLOWED)                                                                                  \
    X(llama_model_load_from_splits, FOLLOWED)                                                                                    \
    X(llama_free_model, FOLLOWED)                                                                                                \
    X(llama_model_free, FOLLOWED)                                                                                                \
    X(llama_init_from_model, FOLLOWED)                                                                                           \
    X(llama_new_context_with_model, FOLLOWED)                                                                                    \
    X(llama_free, FOLLOWED)                                                                                                      \
    X(llama_encode, REFUSED)                                                                                                     \
    X(llama_decode, FOLLOWED)                                                                                                    \
    X(llama_batch_ext_init, FOLLOWED)                                                                                            \
    X(llama_batch_ext_free, FOLLOWED)                                                                                            \
    X(llama_batch_ext_clear, FOLLOWED)                                                                                           \
    X(llama_batch_ext_add, FOLLOWED)                                                                                             \
    X(llama_batch_ext_add_token, FOLLOWED)                                                                                       \
    X(llama_batch_ext_add_embd, FOLLOWED)                                                                                        \
    X(llama_batch_ext_add_seq, FOLLOWED)                                                                                         \
    X(llama_batch_ext_set_embd_token, FOLLOWED)                                                                                  \
    X(llama_batch_ext_set_embd_state, FOLLOWED)                                                                                  \
    X(llama_batch_ext_set_output_embd, FOLLOWED)                                                                                 \
    X(llama_batch_ext_set_output_logits, FOLLOWED)                                                                               \
    X(llama_batch_ext_set_pos, FOLLOWED)                                                                                         \
    X(llama_process, FOLLOWED)                                                                                                   \
    X(llama_memory_clear, FOLLOWED)                                                                                              \
    X(llama_memory_seq_rm, FOLLOWED)                                                                                             \
    X(llama_memory_seq_cp, FOLLOWED)                                                                                             \
    X(llama_memory_seq_keep, FOLLOWED)                                                                                           \
    X(llama_memory_seq_add, REFUSED)                                                                                             \
    X(llama_memory_seq_div, REFUSED)                                                                                             \
    X(llama_memory_can_shift, REFUSED)                                                                                           \
    X(llama_state_get_size, FOLLOWED)                                                                                            \
    X(llama_get_state_size, FOLLOWED)                                                                                            \
    X(llama_state_get_data, FOLLOWED)                                                                                            \
    X(llama_copy_state_data, FOLLOWED)                                                                                           \
    X(llama_state_set_data, FOLLOWED)                                                                                            \
    X(llama_set_state_data, REFUSED)                                                                                             \
    X(llama_state_load_file, FOLLOWED)                                                                                           \
    X(llama_load_session_file, FOLLOWED)                                                                                         \
    X(llama_state_save_file, FOLLOWED)                                                                                           \
    X(llama_save_session_file, FOLLOWED)                                                                                         \
    X(llama_state_seq_get_size, FOLLOWED)                                                                                        \
    X(llama_state_seq_get_data, FOLLOWED)                                                                                        \
    X(llama_state_seq_set_data, FOLLOWED)                                                                                        \
    X(llama_state_seq_save_file, FOLLOWED)                                                                                       \
    X(llama_state_seq_load_file, FOLLOWED)                                                                                       \
    X(llama_state_seq_get_size_ext, FOLLOWED)                                                                                    \
    X(llama_state_seq_get_data_ext, FOLLOWED)                                                                                    \
    X(llama_state_seq_set_data_ext, FOLLOWED)                                                                                    \
    X(llama_set_embeddings, FOLLOWED)                                                                                            \
    X(llama_set_causal_attn, REFUSED)                                                                                            \
    X(llama_set_sampler, REFUSED)                                                                                                \
    X(llama_get_logits, LOCKED)                                                                                                  \
    X(llama_get_logits_ith, LOCKED)                                                                                              \
    X(llama_get_embeddings, LOCKED)                                                                                              \
    X(llama_get_embeddings_ith, LOCKED)                                                                                          \
    X(llama_get_embeddings_seq, LOCKED)                                                                                          \
    X(llama_get_sampled_token_ith, LOCKED)                                                                                       \
    X(llama_get_sampled_probs_ith, LOCKED)                                                                                       \
    X(llama_get_sampled_probs_count_ith, LOCKED)                                                                                 \
    X(llama_get_sampled_logits_ith, LOCKED)                                                                                      \
    X(llama_get_sampled_logits_count_ith, LOCKED)                                                                                \
    X(llama_get_sampled_candidates_ith, LOCKED)                                                                                  \
    X(llama_get_sampled_candidates_count_ith, LOCKED)                                                                            \
    X(llama_opt_init, REFUSED)                                                                                                   \
    X(llama_opt_epoch, REFUSED)

// X(name): the ones that are left to llama.cpp, by the reason.
#define ADL_HARMLESS(X)                                                                                                        \
    /* constants, names and the machine */                                                                                     \
    X(llama_ftype_name) X(llama_flash_attn_type_name) X(llama_load_mode_name) X(llama_load_mode_from_str)                      \
    X(llama_version) X(llama_model_default_params) X(llama_context_default_params) X(llama_sampler_chain_default_params)       \
    X(llama_model_quantize_default_params) X(llama_backend_init) X(llama_backend_free) X(llama_numa_init)                      \
    X(llama_time_us) X(llama_max_devices) X(llama_max_parallel_sequences) X(llama_max_tensor_buft_overrides)                   \
    X(llama_supports_mmap) X(llama_supports_mlock) X(llama_supports_gpu_offload) X(llama_supports_rpc)                         \
    X(llama_split_path) X(llama_split_prefix) X(llama_print_system_info) X(llama_log_get) X(llama_log_set)                     \
    /* text and ids, of a vocabulary */                                                                                        \
    X(llama_n_vocab) X(llama_vocab_type) X(llama_vocab_n_tokens) X(llama_vocab_get_text) X(llama_vocab_get_score)              \
    X(llama_vocab_get_attr) X(llama_vocab_is_eog) X(llama_vocab_is_control) X(llama_vocab_bos) X(llama_vocab_eos)              \
    X(llama_vocab_eot) X(llama_vocab_sep) X(llama_vocab_nl) X(llama_vocab_pad) X(llama_vocab_mask)                             \
    X(llama_vocab_get_add_bos) X(llama_vocab_get_add_eos) X(llama_vocab_get_add_sep) X(llama_vocab_get_suppress_tokens)        \
    X(llama_vocab_fim_pre) X(llama_vocab_fim_suf) X(llama_vocab_fim_mid) X(llama_vocab_fim_pad) X(llama_vocab_fim_rep)         \
    X(llama_vocab_fim_sep) X(llama_token_get_text) X(llama_token_get_score) X(llama_token_get_attr)                            \
    X(llama_token_is_eog) X(llama_token_is_control) X(llama_token_bos) X(llama_token_eos) X(llama_token_eot)                   \
    X(llama_token_cls) X(llama_token_sep) X(llama_token_nl) X(llama_token_pad) X(llama_add_bos_token)                          \
    X(llama_add_eos_token) X(llama_token_fim_pre) X(llama_token_fim_suf) X(llama_token_fim_mid) X(llama_token_fim_pad)         \
    X(llama_token_fim_rep) X(llama_token_fim_sep) X(llama_vocab_cls) X(llama_tokenize) X(llama_token_to_piece)                 \
    X(llama_detokenize) X(llama_chat_apply_template) X(llama_chat_builtin_templates)                                           \
    /* what a model is */                                                                                                      \
    X(llama_n_ctx_train) X(llama_n_embd) X(llama_n_layer) X(llama_n_head) X(llama_get_model) X(llama_model_get_vocab)          \
    X(llama_model_rope_type) X(llama_model_n_ctx_train) X(llama_model_n_embd) X(llama_model_n_embd_inp)                        \
    X(llama_model_n_embd_out) X(llama_model_n_layer) X(llama_model_n_layer_nextn) X(llama_model_n_head)                        \
    X(llama_model_n_head_kv) X(llama_model_n_swa) X(llama_model_rope_freq_scale_train) X(llama_model_n_cls_out)                \
    X(llama_model_cls_label) X(llama_model_meta_val_str) X(llama_model_meta_count) X(llama_model_meta_key_str)                 \
    X(llama_model_meta_key_by_index) X(llama_model_meta_val_str_by_index) X(llama_model_desc) X(llama_model_ftype)             \
    X(llama_model_size) X(llama_model_chat_template) X(llama_model_n_params) X(llama_model_has_encoder)                        \
    X(llama_model_has_decoder) X(llama_model_decoder_start_token) X(llama_model_is_recurrent) X(llama_model_is_hybrid)         \
    X(llama_model_is_diffusion)                                                                                                \
    /* files of weights: they go through no context */                                                                         \
    X(llama_model_save_to_file) X(llama_model_quantize)                                                                        \
    /* change what the teacher computes: its rows are adjusted as they come */                                                 \
    X(llama_adapter_lora_init) X(llama_adapter_lora_init_from_file_ptr) X(llama_adapter_meta_val_str)                          \
    X(llama_adapter_meta_count) X(llama_adapter_meta_key_by_index) X(llama_adapter_meta_val_str_by_index)                      \
    X(llama_adapter_lora_free) X(llama_adapter_get_alora_n_invocation_tokens)                                                  \
    X(llama_adapter_get_alora_invocation_tokens) X(llama_set_adapters_lora) X(llama_set_adapter_cvec)                          \
    X(llama_set_warmup)                                                                                                        \
    /* sizes and pointers of a context, read only */                                                                           \
    X(llama_n_ctx) X(llama_n_ctx_seq) X(llama_n_batch) X(llama_n_ubatch) X(llama_n_seq_max) X(llama_n_rs_seq)                  \
    X(llama_get_memory) X(llama_pooling_type) X(llama_memory_seq_pos_min) X(llama_memory_seq_pos_max) X(llama_n_threads)       \
    X(llama_n_threads_batch) X(llama_get_causal_attn)                                                                          \
    /* who computes; a decode that is aborted closes its rows */                                                               \
    X(llama_attach_threadpool) X(llama_detach_threadpool) X(llama_set_n_threads) X(llama_set_abort_callback)                   \
    X(llama_synchronize)                                                                                                       \
    /* memory of the caller's own */                                                                                           \
    X(llama_batch_get_one) X(llama_batch_init) X(llama_batch_free)                                                             \
    /* work on candidates, which are made of rows that were adjusted in place */                                               \
    X(llama_sampler_init) X(llama_sampler_name) X(llama_sampler_accept) X(llama_sampler_apply) X(llama_sampler_reset)          \
    X(llama_sampler_clone) X(llama_sampler_copy) X(llama_sampler_free) X(llama_sampler_chain_init)                             \
    X(llama_sampler_chain_add) X(llama_sampler_chain_get) X(llama_sampler_chain_n) X(llama_sampler_chain_remove)               \
    X(llama_sampler_init_greedy) X(llama_sampler_init_dist) X(llama_sampler_init_top_k) X(llama_sampler_init_top_p)            \
    X(llama_sampler_init_min_p) X(llama_sampler_init_typical) X(llama_sampler_init_temp) X(llama_sampler_init_temp_ext)        \
    X(llama_sampler_init_xtc) X(llama_sampler_init_top_n_sigma) X(llama_sampler_init_mirostat)                                 \
    X(llama_sampler_init_mirostat_v2) X(llama_sampler_init_grammar) X(llama_sampler_init_grammar_lazy)                         \
    X(llama_sampler_init_grammar_lazy_patterns) X(llama_sampler_init_penalties) X(llama_sampler_init_dry)                      \
    X(llama_sampler_init_adaptive_p) X(llama_sampler_init_logit_bias) X(llama_sampler_init_infill)                             \
    X(llama_sampler_get_seed) X(llama_sampler_sample)                                                                          \
    /* counters */                                                                                                             \
    X(llama_perf_context) X(llama_perf_context_print) X(llama_perf_context_reset) X(llama_perf_sampler)                        \
    X(llama_perf_sampler_print) X(llama_perf_sampler_reset)                                                                    \
    /* a filter of tensors, for training */                                                                                    \
    X(llama_opt_param_filter_all)

// X(name): the C++ functions of llama-ext.h, which llama.cpp's own programs import. None is stood before.
#define ADL_EXTENSIONS(X)                                                                                                      \
    /* sizes, devices, types of weights, the memory that a context takes */                                                    \
    X(llama_graph_reserve) X(llama_ftype_get_default_type) X(llama_quant_init) X(llama_quant_free)                             \
    X(llama_quant_model_from_metadata) X(llama_quant_tensor_allows_quantization) X(llama_quant_compute_types)                  \
    X(llama_model_n_expert) X(llama_model_n_devices) X(llama_model_get_device) X(llama_get_memory_breakdown)                   \
    X(llama_get_ctx_other) X(llama_model_dflash_selector_top_k) X(llama_model_target_layer_ids)                                \
    X(llama_model_target_layer_ids_n) X(llama_model_get_tok_embd)                                                              \
    /* states of layers, from which a draft model goes on: its drafts are accepted by adjusted rows, or not at all */          \
    X(llama_set_embeddings_nextn) X(llama_set_nextn_layer_offset) X(llama_get_embeddings_nextn)                                \
    X(llama_get_embeddings_nextn_ith) X(llama_set_embeddings_layer_inp) X(llama_get_embeddings_layer_inp)                      \
    /* of models that decide between options, and write no text (0.6.0-dev) */                                                 \
    X(llama_batch_ext_set_decision_order)
