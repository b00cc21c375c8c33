// llama.cpp as adlocal reaches it: the functions that it calls and the structures that cross the border.
//
// A host needs none of this; adlocal.h makes struct adl_llama of it. A binding that fills the table at run time asks
// adl_llama_function_name and adl_llama_struct_name.

#ifndef ADLOCAL_LLAMA_H
#define ADLOCAL_LLAMA_H

// X(type of the result, name, arguments): everything that the library calls.
#define ADL_LLAMA_FUNCTIONS(X)                                                                                                  \
    X(const char *,                llama_version,                (void))                                                       \
    X(struct llama_model_params,   llama_model_default_params,   (void))                                                       \
    X(struct llama_context_params, llama_context_default_params, (void))                                                       \
    X(bool,                        llama_supports_gpu_offload,   (void))                                                       \
    X(struct llama_model *,        llama_model_load_from_file,   (const char * path, struct llama_model_params params))        \
    X(void,                        llama_model_free,             (struct llama_model * model))                                 \
    X(const struct llama_vocab *,  llama_model_get_vocab,        (const struct llama_model * model))                           \
    X(int32_t,                     llama_model_n_ctx_train,      (const struct llama_model * model))                           \
    X(int32_t,                     llama_model_n_swa,            (const struct llama_model * model))                           \
    X(struct llama_adapter_lora *, llama_adapter_lora_init,      (struct llama_model * model, const char * path))              \
    X(struct llama_context *,      llama_init_from_model,        (struct llama_model * model, struct llama_context_params p))  \
    X(void,                        llama_free,                   (struct llama_context * ctx))                                 \
    X(uint32_t,                    llama_n_ctx,                  (const struct llama_context * ctx))                           \
    X(uint32_t,                    llama_n_batch,                (const struct llama_context * ctx))                           \
    X(void,                        llama_set_n_threads,          (struct llama_context * ctx, int32_t n, int32_t n_batch))     \
    X(int32_t,                     llama_set_adapters_lora,      (struct llama_context * ctx, struct llama_adapter_lora ** adapters, \
                                                                  size_t n, float * scales))                                   \
    X(llama_memory_t,              llama_get_memory,             (const struct llama_context * ctx))                           \
    X(void,                        llama_memory_clear,           (llama_memory_t mem, bool data))                              \
    X(bool,                        llama_memory_seq_rm,          (llama_memory_t mem, llama_seq_id s, llama_pos a, llama_pos b)) \
    X(void,                        llama_memory_seq_cp,          (llama_memory_t mem, llama_seq_id s, llama_seq_id t,          \
                                                                  llama_pos a, llama_pos b))                                   \
    X(void,                        llama_memory_seq_keep,        (llama_memory_t mem, llama_seq_id s))                         \
    X(llama_pos,                   llama_memory_seq_pos_min,     (llama_memory_t mem, llama_seq_id s))                         \
    X(llama_pos,                   llama_memory_seq_pos_max,     (llama_memory_t mem, llama_seq_id s))                         \
    X(int32_t,                     llama_decode,                 (struct llama_context * ctx, struct llama_batch batch))       \
    X(void,                        llama_synchronize,            (struct llama_context * ctx))                                 \
    X(float *,                     llama_get_logits,             (struct llama_context * ctx))                                 \
    X(int32_t,                     llama_vocab_n_tokens,         (const struct llama_vocab * vocab))                           \
    X(const char *,                llama_vocab_get_text,         (const struct llama_vocab * vocab, llama_token token))        \
    X(enum llama_token_attr,       llama_vocab_get_attr,         (const struct llama_vocab * vocab, llama_token token))        \
    X(bool,                        llama_vocab_is_eog,           (const struct llama_vocab * vocab, llama_token token))        \
    X(llama_token,                 llama_vocab_bos,              (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_eos,              (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_eot,              (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_sep,              (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_nl,               (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_pad,              (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_pre,          (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_suf,          (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_mid,          (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_pad,          (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_rep,          (const struct llama_vocab * vocab))                           \
    X(llama_token,                 llama_vocab_fim_sep,          (const struct llama_vocab * vocab))                           \
    X(struct llama_sampler *,      llama_sampler_init,           (struct llama_sampler_i * iface, void * ctx))                 \
    X(struct gguf_context *,       gguf_init_from_file,          (const char * path, struct gguf_init_params params))          \
    X(void,                        gguf_free,                    (struct gguf_context * ctx))                                  \
    X(int64_t,                     gguf_get_n_kv,                (const struct gguf_context * ctx))                            \
    X(int64_t,                     gguf_find_key,                (const struct gguf_context * ctx, const char * key))          \
    X(enum gguf_type,              gguf_get_kv_type,             (const struct gguf_context * ctx, int64_t key))               \
    X(const void *,                gguf_get_val_data,            (const struct gguf_context * ctx, int64_t key))               \
    X(const char *,                gguf_get_val_str,             (const struct gguf_context * ctx, int64_t key))               \
    X(enum gguf_type,              gguf_get_arr_type,            (const struct gguf_context * ctx, int64_t key))               \
    X(size_t,                      gguf_get_arr_n,               (const struct gguf_context * ctx, int64_t key))               \
    X(const void *,                gguf_get_arr_data,            (const struct gguf_context * ctx, int64_t key))               \
    X(const char *,                gguf_get_arr_str,             (const struct gguf_context * ctx, int64_t key, size_t i))     \
    X(int64_t,                     gguf_get_n_tensors,           (const struct gguf_context * ctx))                            \
    X(const char *,                gguf_get_tensor_name,         (const struct gguf_context * ctx, int64_t tensor))            \
    X(enum ggml_type,              gguf_get_tensor_type,         (const struct gguf_context * ctx, int64_t tensor))

// Y(name): the structures that cross the boundary. Their sizes as the host sees them are part of the handshake.
#define ADL_LLAMA_STRUCTS(Y)                                                                                             \
    Y(llama_batch) Y(llama_token_data) Y(llama_token_data_array) Y(llama_model_params) Y(llama_context_params)           \
    Y(llama_sampler_i) Y(gguf_init_params)

#endif // ADLOCAL_LLAMA_H
