// What would show the teacher's own.

#include "guard.hpp"

using plugin::Context;
using plugin::find;
using plugin::Process;
using plugin::real;

namespace {

// Rows that must not be read: a model of another vocabulary that may only embed.
bool is_shut(const llama_context * context) {
    return Process::get().is_closed(context);
}

} // namespace

ADL_GUARD void llama_set_embeddings(llama_context * context, bool value) {
    if (Context * c = find(context)) {
        c->set_embeddings(value);
    }
    real().llama_set_embeddings(context, value);
}

ADL_GUARD void llama_set_causal_attn(llama_context * context, bool value) {
    if (Context * c = find(context)) {
        c->set_causal(value);
    }
    real().llama_set_causal_attn(context, value);
}

// The program then samples on the CPU. Samplers are a request's: who sets one, or takes one away, begins the next request.
ADL_GUARD bool llama_set_sampler(llama_context * context, llama_seq_id seq_id, llama_sampler * sampler) {
    if (Context * c = find(context)) {
        c->begin(seq_id);
        return false;
    }
    return !is_shut(context) && real().llama_set_sampler(context, seq_id, sampler);
}

ADL_GUARD float * llama_get_logits(llama_context * context) {
    Context * c = find(context);
    return (c && !c->readable()) || is_shut(context) ? nullptr : real().llama_get_logits(context);
}

ADL_GUARD float * llama_get_logits_ith(llama_context * context, int32_t i) {
    Context * c = find(context);
    if (c != nullptr && !c->readable()) {
        return c->closed_row();
    }
    return is_shut(context) ? nullptr : real().llama_get_logits_ith(context, i);
}

namespace {

// Logits follow from a token's own embedding; from a pooled one they do not.
bool shows_embeddings(const llama_context * context) {
    return find(context) == nullptr || real().llama_pooling_type(context) > LLAMA_POOLING_TYPE_NONE;
}

} // namespace

ADL_GUARD float * llama_get_embeddings(llama_context * context) {
    return shows_embeddings(context) ? real().llama_get_embeddings(context) : nullptr;
}

ADL_GUARD float * llama_get_embeddings_ith(llama_context * context, int32_t i) {
    return find(context) == nullptr ? real().llama_get_embeddings_ith(context, i) : nullptr;
}

ADL_GUARD float * llama_get_embeddings_seq(llama_context * context, llama_seq_id seq_id) {
    return shows_embeddings(context) ? real().llama_get_embeddings_seq(context, seq_id) : nullptr;
}

#define ADL_SAMPLED(result, name, nothing)                                                                                       \
    ADL_GUARD result name(llama_context * context, int32_t i) {                                                                  \
        return find(context) == nullptr && !is_shut(context) ? real().name(context, i) : nothing;                                \
    }

ADL_SAMPLED(llama_token, llama_get_sampled_token_ith, LLAMA_TOKEN_NULL)
ADL_SAMPLED(float *, llama_get_sampled_probs_ith, nullptr)
ADL_SAMPLED(uint32_t, llama_get_sampled_probs_count_ith, 0)
ADL_SAMPLED(float *, llama_get_sampled_logits_ith, nullptr)
ADL_SAMPLED(llama_token *, llama_get_sampled_candidates_ith, nullptr)
ADL_SAMPLED(uint32_t, llama_get_sampled_candidates_count_ith, 0)

// How long a row is, to llama-server: where nothing was sampled on the device, as long as the vocabulary.
ADL_GUARD uint32_t llama_get_sampled_logits_count_ith(llama_context * context, int32_t i) {
    if (find(context) == nullptr) {
        return is_shut(context) ? 0 : real().llama_get_sampled_logits_count_ith(context, i);
    }
    const auto & llama = real().table;
    return static_cast<uint32_t>(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(real().llama_get_model(context))));
}

ADL_GUARD void llama_opt_init(llama_context * context, llama_model * model, llama_opt_params params) {
    if (find(context) != nullptr) {
        plugin::die("the program trains the protected model; run it without protection");
    }
    real().llama_opt_init(context, model, params);
}

ADL_GUARD void llama_opt_epoch(
        llama_context * context, ggml_opt_dataset_t dataset, ggml_opt_result_t train, ggml_opt_result_t eval, int64_t split,
        ggml_opt_epoch_callback on_train, ggml_opt_epoch_callback on_eval) {
    if (find(context) != nullptr) {
        plugin::die("the program trains the protected model; run it without protection");
    }
    real().llama_opt_epoch(context, dataset, train, eval, split, on_train, on_eval);
}
