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
