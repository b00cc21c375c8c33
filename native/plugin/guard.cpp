// The functions that stand before llama.cpp's own. There is no protection in them: that is adl_lockstep's.

#include "batches.hpp"
#include "process.hpp"
#include "real.hpp"
#include "states.hpp"

#include <cstring>

#define ADL_GUARD extern "C" __attribute__((visibility("default")))

using plugin::Context;
using plugin::Kind;
using plugin::Process;
using plugin::real;

namespace {

Context * find(const llama_context * context) {
    return Process::get().find(context);
}

// Rows that must not be read: a model of another vocabulary that may only embed.
bool is_shut(const llama_context * context) {
    return Process::get().is_closed(context);
}

llama_model * loaded(llama_model * model, const char * path, const llama_model_params & params) {
    if (model != nullptr) {
        Process::get().loaded(model, path ? path : "", params);
    }
    return model;
}

} // namespace

//
// Models
//

ADL_GUARD llama_model * llama_model_init_from_user(
        gguf_context * metadata, llama_model_set_tensor_data_t set_tensor_data, void * user_data, llama_model_params params) {
    return loaded(real().llama_model_init_from_user(metadata, set_tensor_data, user_data, params), nullptr, params);
}

ADL_GUARD llama_model * llama_load_model_from_file(const char * path, llama_model_params params) {
    return loaded(real().llama_load_model_from_file(path, params), path, params);
}

ADL_GUARD llama_model * llama_model_load_from_file(const char * path, llama_model_params params) {
    return loaded(real().llama_model_load_from_file(path, params), path, params);
}

ADL_GUARD llama_model * llama_model_load_from_file_ptr(FILE * file, llama_model_params params) {
    return loaded(real().llama_model_load_from_file_ptr(file, params), nullptr, params);
}

ADL_GUARD llama_model * llama_model_load_from_splits(const char ** paths, size_t n_paths, llama_model_params params) {
    return loaded(real().llama_model_load_from_splits(paths, n_paths, params), n_paths > 0 ? paths[0] : nullptr, params);
}

ADL_GUARD void llama_model_free(llama_model * model) {
    Process::get().unloaded(model);
    real().llama_model_free(model);
}

ADL_GUARD void llama_free_model(llama_model * model) {
    llama_model_free(model);
}

//
// Contexts
//

// Declared here without llama.h, whose own declaration has one layout of the parameters.
namespace {

llama_context * init(llama_model * model, plugin::HostContextParams host) {
    if (model == nullptr) {
        return real().init(model, host);
    }
    Process &            process = Process::get();
    llama_context_params params  = real().layout.to_ours(host);
    const Kind           kind    = process.kind(model, params);
    if (kind != Kind::LEFT_ALONE) {
        if (params.cb_eval != nullptr) {
            plugin::die("the program watches the computation (cb_eval), where unprotected logits pass; it cannot be protected");
        }
        params.samplers   = nullptr; // on the device, before anything is adjusted: the program samples on the CPU
        params.n_samplers = 0;
        real().layout.to_host(params, host);
    }
    llama_context * context = real().init(model, host);
    if (context != nullptr && kind == Kind::PROTECTED) {
        process.made(context, model, params);
    } else if (context != nullptr && kind == Kind::CLOSED) {
        process.shut(context);
    }
    return context;
}

} // namespace

ADL_GUARD llama_context * adl_guarded_init(llama_model * model, plugin::HostContextParams host) __asm__("llama_init_from_model");
ADL_GUARD llama_context * adl_guarded_new(llama_model * model, plugin::HostContextParams host) __asm__("llama_new_context_with_model");

llama_context * adl_guarded_init(llama_model * model, plugin::HostContextParams host) {
    return init(model, host);
}

llama_context * adl_guarded_new(llama_model * model, plugin::HostContextParams host) {
    return init(model, host);
}

ADL_GUARD void llama_free(llama_context * context) {
    Process::get().freed(context);
    real().llama_free(context);
}

//
// Decoding
//

ADL_GUARD int32_t llama_encode(llama_context * context, llama_batch batch) {
    return find(context) ? -3 : real().llama_encode(context, batch); // it leaves the logits of every token
}

ADL_GUARD int32_t llama_decode(llama_context * context, llama_batch batch) {
    Context * c = find(context);
    return c ? c->step(batch, [&] { return real().llama_decode(context, batch); }) : real().llama_decode(context, batch);
}

ADL_GUARD llama_batch_ext * llama_batch_ext_init(llama_context * context) {
    llama_batch_ext * batch = real().llama_batch_ext_init(context);
    if (batch != nullptr) {
        plugin::shadow_of(batch).clear();
    }
    return batch;
}

ADL_GUARD void llama_batch_ext_free(llama_batch_ext * batch) {
    plugin::forget_shadow(batch);
    real().llama_batch_ext_free(batch);
}

ADL_GUARD void llama_batch_ext_clear(llama_batch_ext * batch) {
    plugin::shadow_of(batch).clear();
    real().llama_batch_ext_clear(batch);
}

ADL_GUARD int32_t llama_batch_ext_add(llama_batch_ext * batch, llama_seq_id seq_id) {
    const int32_t i = real().llama_batch_ext_add(batch, seq_id);
    if (i >= 0) {
        plugin::shadow_of(batch).add(seq_id, LLAMA_TOKEN_NULL, true);
    }
    return i;
}

ADL_GUARD int32_t llama_batch_ext_add_token(llama_batch_ext * batch, llama_seq_id seq_id, llama_token id) {
    const int32_t i = real().llama_batch_ext_add_token(batch, seq_id, id);
    if (i >= 0) {
        plugin::shadow_of(batch).add(seq_id, id, false);
    }
    return i;
}

ADL_GUARD int32_t llama_batch_ext_add_embd(llama_batch_ext * batch, llama_seq_id seq_id, llama_embd embd) {
    const int32_t i = real().llama_batch_ext_add_embd(batch, seq_id, embd);
    if (i >= 0) {
        plugin::shadow_of(batch).add(seq_id, LLAMA_TOKEN_NULL, true);
    }
    return i;
}

ADL_GUARD bool llama_batch_ext_add_seq(llama_batch_ext * batch, int32_t i, llama_seq_id seq_id) {
    const bool done = real().llama_batch_ext_add_seq(batch, i, seq_id);
    if (done) {
        plugin::shadow_of(batch).add_sequence(i, seq_id);
    }
    return done;
}

ADL_GUARD bool llama_batch_ext_set_embd_token(llama_batch_ext * batch, int32_t i, llama_embd embd) {
    if (embd.data != nullptr) {
        plugin::shadow_of(batch).set_embedding(i);
    }
    return real().llama_batch_ext_set_embd_token(batch, i, embd);
}

ADL_GUARD bool llama_batch_ext_set_embd_state(llama_batch_ext * batch, int32_t i, llama_embd embd) {
    if (embd.data != nullptr) {
        plugin::shadow_of(batch).set_embedding(i);
    }
    return real().llama_batch_ext_set_embd_state(batch, i, embd);
}

ADL_GUARD bool llama_batch_ext_set_output_embd(llama_batch_ext * batch, int32_t i, bool value) {
    const bool done = real().llama_batch_ext_set_output_embd(batch, i, value);
    if (done) {
        plugin::shadow_of(batch).set_output(i, value);
    }
    return done;
}

ADL_GUARD bool llama_batch_ext_set_output_logits(llama_batch_ext * batch, int32_t i, bool value) {
    const bool done = real().llama_batch_ext_set_output_logits(batch, i, value);
    if (done) {
        plugin::shadow_of(batch).set_output(i, value);
    }
    return done;
}

ADL_GUARD bool llama_batch_ext_set_pos(llama_batch_ext * batch, int32_t i, const llama_pos * pos) {
    const bool done = real().llama_batch_ext_set_pos(batch, i, pos);
    if (done && pos != nullptr) {
        plugin::shadow_of(batch).set_position(i, *pos);
    }
    return done;
}

ADL_GUARD int32_t llama_process(llama_context * context, llama_process_type type, llama_batch_ext * batch) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_process(context, type, batch);
    }
    plugin::ShadowBatch & shadow = plugin::shadow_of(batch);
    if (type != LLAMA_PROCESS_TYPE_DECODE || !shadow.is_followed()) {
        plugin::say("the batch holds embeddings (multimodal input does), or is to be encoded: the pair cannot follow");
        return -3;
    }
    return c->step(shadow.view(), [&] { return real().llama_process(context, type, batch); });
}

//
// Memory
//

ADL_GUARD void llama_memory_clear(llama_memory_t memory, bool data) {
    if (Context * c = Process::get().find(memory)) {
        c->clear();
    } else {
        real().llama_memory_clear(memory, data);
    }
}

ADL_GUARD bool llama_memory_seq_rm(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    Context * c = Process::get().find(memory);
    return c ? adl_lockstep_memory_seq_rm(c->lockstep(), seq_id, p0, p1) : real().llama_memory_seq_rm(memory, seq_id, p0, p1);
}

ADL_GUARD void llama_memory_seq_cp(llama_memory_t memory, llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    Context * c = Process::get().find(memory);
    if (c == nullptr) {
        real().llama_memory_seq_cp(memory, source, target, p0, p1);
    } else if (adl_lockstep_memory_seq_cp(c->lockstep(), source, target, p0, p1) != ADL_OK) {
        c->poison(adl_last_error());
    }
}

ADL_GUARD void llama_memory_seq_keep(llama_memory_t memory, llama_seq_id seq_id) {
    if (Context * c = Process::get().find(memory)) {
        adl_lockstep_memory_seq_keep(c->lockstep(), seq_id);
    } else {
        real().llama_memory_seq_keep(memory, seq_id);
    }
}

// Programs ask llama_memory_can_shift first, and are told no.
ADL_GUARD void llama_memory_seq_add(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos delta) {
    if (Context * c = Process::get().find(memory)) {
        c->poison("the program shifts the context (llama_memory_seq_add), which the pair cannot follow");
    } else {
        real().llama_memory_seq_add(memory, seq_id, p0, p1, delta);
    }
}

ADL_GUARD void llama_memory_seq_div(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (Context * c = Process::get().find(memory)) {
        c->poison("the program divides positions (llama_memory_seq_div), which the pair cannot follow");
    } else {
        real().llama_memory_seq_div(memory, seq_id, p0, p1, d);
    }
}

ADL_GUARD bool llama_memory_can_shift(llama_memory_t memory) {
    return Process::get().find(memory) == nullptr && real().llama_memory_can_shift(memory);
}

//
// Saved states
//

namespace {

llama_seq_id last_seq(const Context & c) {
    return static_cast<llama_seq_id>(c.n_seq_max) - 1;
}

// llama.cpp's own bytes, and the trailer after them.
template <typename Get>
size_t get_state(const Context & c, llama_seq_id first, llama_seq_id last, uint8_t * dst, size_t size, Get && get) {
    const auto bytes = plugin::trailer(c, first, last);
    if (dst == nullptr || size < bytes.size()) {
        return 0;
    }
    const size_t own = get(size - bytes.size());
    if (own == 0) {
        return 0;
    }
    std::memcpy(dst + own, bytes.data(), bytes.size());
    return own + bytes.size();
}

template <typename Set>
size_t set_state(Context & c, llama_seq_id target, const uint8_t * src, size_t size, Set && set) {
    const size_t own = plugin::own_size(src, size);
    if (own == 0) {
        plugin::say("a saved state says nothing of its tokens, so the pair cannot follow it; it is not restored");
        return 0;
    }
    if (set(own) == 0) {
        return 0;
    }
    if (!plugin::apply(c, src, size, target)) {
        c.poison("a saved state could not be followed");
        return 0;
    }
    return size;
}

bool is_refused(llama_state_seq_flags flags) {
    return (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) != 0;
}

} // namespace

ADL_GUARD size_t llama_state_get_size(llama_context * context) {
    const size_t own = real().llama_state_get_size(context);
    Context *    c   = find(context);
    return c && own ? own + plugin::trailer(*c, 0, last_seq(*c)).size() : own;
}

ADL_GUARD size_t llama_get_state_size(llama_context * context) {
    return llama_state_get_size(context);
}

ADL_GUARD size_t llama_state_get_data(llama_context * context, uint8_t * dst, size_t size) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_get_data(context, dst, size);
    }
    return get_state(*c, 0, last_seq(*c), dst, size, [&](size_t own) { return real().llama_state_get_data(context, dst, own); });
}

ADL_GUARD size_t llama_copy_state_data(llama_context * context, uint8_t * dst) {
    return llama_state_get_data(context, dst, llama_state_get_size(context));
}

ADL_GUARD size_t llama_state_set_data(llama_context * context, const uint8_t * src, size_t size) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_set_data(context, src, size);
    }
    return set_state(*c, -1, src, size, [&](size_t own) { return real().llama_state_set_data(context, src, own); });
}

// It does not say how long the state is.
ADL_GUARD size_t llama_set_state_data(llama_context * context, const uint8_t * src) {
    return find(context) ? 0 : real().llama_set_state_data(context, src);
}

ADL_GUARD size_t llama_state_seq_get_size_ext(llama_context * context, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c != nullptr && is_refused(flags)) {
        return 0;
    }
    const size_t own = real().llama_state_seq_get_size_ext(context, seq_id, flags);
    return c && own ? own + plugin::trailer(*c, seq_id, seq_id).size() : own;
}

ADL_GUARD size_t llama_state_seq_get_size(llama_context * context, llama_seq_id seq_id) {
    return llama_state_seq_get_size_ext(context, seq_id, 0);
}

ADL_GUARD size_t llama_state_seq_get_data_ext(
        llama_context * context, uint8_t * dst, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_seq_get_data_ext(context, dst, size, seq_id, flags);
    }
    const auto get = [&](size_t own) { return real().llama_state_seq_get_data_ext(context, dst, own, seq_id, flags); };
    return is_refused(flags) ? 0 : get_state(*c, seq_id, seq_id, dst, size, get);
}

ADL_GUARD size_t llama_state_seq_get_data(llama_context * context, uint8_t * dst, size_t size, llama_seq_id seq_id) {
    return llama_state_seq_get_data_ext(context, dst, size, seq_id, 0);
}

ADL_GUARD size_t llama_state_seq_set_data_ext(
        llama_context * context, const uint8_t * src, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_seq_set_data_ext(context, src, size, seq_id, flags);
    }
    const auto set = [&](size_t own) { return real().llama_state_seq_set_data_ext(context, src, own, seq_id, flags); };
    return is_refused(flags) ? 0 : set_state(*c, seq_id, src, size, set);
}

ADL_GUARD size_t llama_state_seq_set_data(llama_context * context, const uint8_t * src, size_t size, llama_seq_id seq_id) {
    return llama_state_seq_set_data_ext(context, src, size, seq_id, 0);
}

ADL_GUARD bool llama_state_save_file(llama_context * context, const char * path, const llama_token * tokens, size_t n) {
    const bool saved = real().llama_state_save_file(context, path, tokens, n);
    Context *  c     = find(context);
    return saved && (c == nullptr || plugin::append_trailer(path, plugin::trailer(*c, 0, last_seq(*c))));
}

ADL_GUARD bool llama_save_session_file(llama_context * context, const char * path, const llama_token * tokens, size_t n) {
    return llama_state_save_file(context, path, tokens, n);
}

ADL_GUARD bool llama_state_load_file(llama_context * context, const char * path, llama_token * tokens, size_t capacity, size_t * n) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_load_file(context, path, tokens, capacity, n);
    }
    const plugin::StrippedFile file(path);
    const auto load = [&](size_t) { return file.is_ours() && real().llama_state_load_file(context, file.path(), tokens, capacity, n) ? 1u : 0u; };
    return set_state(*c, -1, file.state().data(), file.state().size(), load) != 0;
}

ADL_GUARD bool llama_load_session_file(llama_context * context, const char * path, llama_token * tokens, size_t capacity, size_t * n) {
    return llama_state_load_file(context, path, tokens, capacity, n);
}

ADL_GUARD size_t llama_state_seq_save_file(
        llama_context * context, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n) {
    const size_t saved = real().llama_state_seq_save_file(context, path, seq_id, tokens, n);
    Context *    c     = find(context);
    if (c == nullptr || saved == 0) {
        return saved;
    }
    const auto bytes = plugin::trailer(*c, seq_id, seq_id);
    return plugin::append_trailer(path, bytes) ? saved + bytes.size() : 0;
}

ADL_GUARD size_t llama_state_seq_load_file(
        llama_context * context, const char * path, llama_seq_id seq_id, llama_token * tokens, size_t capacity, size_t * n) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_seq_load_file(context, path, seq_id, tokens, capacity, n);
    }
    const plugin::StrippedFile file(path);
    const auto load = [&](size_t) -> size_t {
        return file.is_ours() ? real().llama_state_seq_load_file(context, file.path(), seq_id, tokens, capacity, n) : 0;
    };
    return set_state(*c, seq_id, file.state().data(), file.state().size(), load);
}

//
// What would show the teacher's own
//

ADL_GUARD void llama_set_embeddings(llama_context * context, bool value) {
    if (Context * c = find(context)) {
        c->set_embeddings(value);
    }
    real().llama_set_embeddings(context, value);
}

// Without it every token sees every other: the pair's rows would be others.
ADL_GUARD void llama_set_causal_attn(llama_context * context, bool value) {
    Context * c = find(context);
    if (c != nullptr && !value) {
        c->poison("the program turns causal attention off, which the pair cannot follow");
    }
    real().llama_set_causal_attn(context, value);
}

// The program then samples on the CPU.
ADL_GUARD bool llama_set_sampler(llama_context * context, llama_seq_id seq_id, llama_sampler * sampler) {
    return find(context) == nullptr && !is_shut(context) && real().llama_set_sampler(context, seq_id, sampler);
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
ADL_SAMPLED(uint32_t, llama_get_sampled_logits_count_ith, 0)
ADL_SAMPLED(llama_token *, llama_get_sampled_candidates_ith, nullptr)
ADL_SAMPLED(uint32_t, llama_get_sampled_candidates_count_ith, 0)

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
