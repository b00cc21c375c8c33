// The pair as adlocal.h shows it: a C border, which no exception crosses.

#include "pair.hpp"

#include "bundle.hpp"
#include "error.hpp"
#include "llama_table.hpp"

#include <algorithm>

using adl::Error;
using adl::format;

namespace {

// With room for a row of each sequence.
adl_pair * make_pair(const adl_llama & llama, std::shared_ptr<const adl::Weights> weights, double epsilon, double delta_scale,
                     const llama_model * teacher, adl_pair_params params) {
    uint32_t & n_outputs_max = params.context.n_outputs_max;
    if (n_outputs_max != 0) { // llama.cpp ends the process when there are fewer rows than sequences
        n_outputs_max = std::max(n_outputs_max, params.context.n_seq_max);
    }
    return new adl_pair(llama, std::move(weights), epsilon, delta_scale, teacher, params);
}

adl_pair * load_pair(const adl_llama * llama, const adl::Source & source, double epsilon, double delta_scale, const llama_model * teacher,
                     const adl_pair_params & params) {
    adl::check_own_size("adl_pair_params", params.size, sizeof params);
    adl::chosen_epsilon(epsilon, params.epsilon, source.is_adapter); // before any weights are read
    return make_pair(*llama, std::make_shared<const adl::Weights>(*llama, source, params.model), epsilon, delta_scale, teacher, params);
}

adl_pair * make_from_files(const char * function, const adl_llama * llama, const char * first, const char * second, bool is_adapter,
                           double epsilon, double delta_scale, const llama_model * teacher, const adl_pair_params & params) {
    return adl::guarded<adl_pair *>(nullptr, [&] {
        adl::check(llama);
        if (first == nullptr || second == nullptr) {
            throw Error{ADL_ERROR_INPUT, format("%s: a path is NULL", function)};
        }
        return load_pair(llama, {first, second, is_adapter}, epsilon, delta_scale, teacher, params);
    });
}

// Calls `body` unless the pair is NULL.
template <typename Body>
int32_t with(adl_pair * pair, Body && body) {
    return adl::status_of([&]() -> int32_t {
        if (pair == nullptr) {
            throw Error{ADL_ERROR_INPUT, "the pair is NULL: adl_pair_init failed, and adl_last_error said why"};
        }
        return body();
    });
}

const adl::Proxy & proxy_of(const adl_pair * pair, adl_sign sign) {
    return sign == ADL_PLUS ? pair->plus : pair->minus;
}

} // namespace

struct adl_pair_params adl_pair_default_params(const struct adl_llama * llama) {
    adl_pair_params params = {sizeof(adl_pair_params), llama->llama_model_default_params(), llama->llama_context_default_params(),
                              ADL_CONCURRENCY_AUTO, 0.0};
    params.context.n_outputs_max = params.context.n_outputs_max_per_seq = 1;
    params.context.kv_unified = true; // any subset of sequences is one graph
    return params;
}

struct adl_pair * adl_pair_init(
        const struct adl_llama * llama, const char * dir, const struct llama_model * teacher, struct adl_pair_params params) {
    return adl::guarded<adl_pair *>(nullptr, [&] {
        adl::check(llama);
        if (teacher == nullptr) {
            throw Error{ADL_ERROR_INPUT, "adl_pair_init: the teacher is NULL"};
        }
        const adl_bundle  bundle = adl::read_bundle(*llama, dir);
        const adl::Source source = {adl::first_path(dir, bundle.is_adapter), adl::second_path(dir, bundle.is_adapter), bundle.is_adapter};
        return load_pair(llama, source, bundle.epsilon, bundle.delta_scale, teacher, params);
    });
}

struct adl_pair * adl_pair_init_from_files(
        const struct adl_llama * llama, const char * path_plus, const char * path_minus, double epsilon, double delta_scale,
        const struct llama_model * teacher, struct adl_pair_params params) {
    return make_from_files("adl_pair_init_from_files", llama, path_plus, path_minus, false, epsilon, delta_scale, teacher, params);
}

struct adl_pair * adl_pair_init_from_adapter(
        const struct adl_llama * llama, const char * path_base, const char * path_adapter, double epsilon, double delta_scale,
        const struct llama_model * teacher, struct adl_pair_params params) {
    return make_from_files("adl_pair_init_from_adapter", llama, path_base, path_adapter, true, epsilon, delta_scale, teacher, params);
}

struct adl_pair * adl_pair_init_from_pair(const struct adl_pair * pair, const struct llama_model * teacher, struct adl_pair_params params) {
    return adl::guarded<adl_pair *>(nullptr, [&] {
        adl::check_own_size("adl_pair_params", params.size, sizeof params);
        if (pair == nullptr || teacher == nullptr) {
            throw Error{ADL_ERROR_INPUT, "adl_pair_init_from_pair: the pair or the teacher is NULL"};
        }
        return make_pair(pair->llama, pair->weights, pair->epsilon, pair->delta_scale, teacher, params);
    });
}

void adl_pair_free(struct adl_pair * pair) {
    delete pair;
}

uint32_t adl_pair_n_ctx(const struct adl_pair * pair) {
    return pair->llama.llama_n_ctx(pair->plus.context);
}

int32_t adl_pair_n_vocab(const struct adl_pair * pair) {
    return pair->n_vocab;
}

int32_t adl_pair_n_shared(const struct adl_pair * pair) {
    return pair->n_shared;
}

struct llama_context * adl_pair_get_context(const struct adl_pair * pair, enum adl_sign sign) {
    return proxy_of(pair, sign).context;
}

struct llama_model * adl_pair_get_model(const struct adl_pair * pair, enum adl_sign sign) {
    return proxy_of(pair, sign).model.handle;
}

double adl_pair_epsilon(const struct adl_pair * pair) {
    return pair->epsilon;
}

int32_t adl_pair_set_epsilon(struct adl_pair * pair, double epsilon) {
    return with(pair, [&] {
        pair->set_epsilon(epsilon);
        return static_cast<int32_t>(ADL_OK);
    });
}

int32_t adl_pair_decode(struct adl_pair * pair, struct llama_batch batch) {
    return with(pair, [&] { return pair->decode(batch); });
}

const char * adl_pair_error(const struct adl_pair * pair) {
    return *pair->error ? pair->error : nullptr;
}

const float * adl_pair_get_logits(struct adl_pair * pair, enum adl_sign sign) {
    return pair->logits(proxy_of(pair, sign));
}

void adl_pair_memory_clear(struct adl_pair * pair) {
    pair->clear();
}

bool adl_pair_memory_seq_rm(struct adl_pair * pair, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return pair->seq_rm(seq_id, p0, p1);
}

void adl_pair_memory_seq_cp(struct adl_pair * pair, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    pair->seq_cp(src, dst, p0, p1);
}

void adl_pair_memory_seq_keep(struct adl_pair * pair, llama_seq_id seq_id) {
    pair->seq_keep(seq_id);
}

void adl_pair_touch(struct adl_pair * pair) {
    pair->touch();
}

int32_t adl_pair_adjust(
        struct adl_pair * pair, float * logits, int32_t n_rows, const double * strength, const double * guard,
        struct adl_row * rows) {
    return with(pair, [&] {
        pair->adjust(logits, n_rows, strength, guard, rows);
        return static_cast<int32_t>(ADL_OK);
    });
}

double adl_pair_dose(struct adl_pair * pair, int32_t row, llama_token token) {
    return pair->dose(row, token);
}

uint64_t adl_pair_serial(const struct adl_pair * pair) {
    return pair->serial();
}

int32_t adl_pair_n_rows(const struct adl_pair * pair) {
    return pair->n_rows();
}
