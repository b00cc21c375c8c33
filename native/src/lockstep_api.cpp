// The lockstep as adlocal.h shows it: a C border, which no exception crosses.

#include "lockstep.hpp"

#include "error.hpp"

using adl::Error;
using adl::format;

namespace {

// Calls `body` unless the lockstep is NULL.
template <typename Body>
int32_t with(const adl_lockstep * lockstep, Body && body) {
    return adl::status_of([&]() -> int32_t {
        if (lockstep == nullptr) {
            throw Error{ADL_ERROR_INPUT, "the lockstep is NULL: adl_lockstep_init failed, and adl_last_error said why"};
        }
        body();
        return ADL_OK;
    });
}

} // namespace

struct adl_lockstep_params adl_lockstep_default_params(void) {
    return {sizeof(adl_lockstep_params), false};
}

struct adl_lockstep * adl_lockstep_init(struct adl_pair * pair, struct llama_context * teacher, struct adl_lockstep_params params) {
    return adl::guarded<adl_lockstep *>(nullptr, [&] {
        adl::check_own_size("adl_lockstep_params", params.size, sizeof params);
        if (pair == nullptr || pair->n_vocab_teacher == 0) {
            throw Error{ADL_ERROR_INPUT, "a lockstep needs a pair that was made with a teacher"};
        }
        if (teacher == nullptr) {
            throw Error{ADL_ERROR_INPUT, "adl_lockstep_init: the teacher's context is NULL"};
        }
        return new adl_lockstep(*pair, teacher, params);
    });
}

void adl_lockstep_free(struct adl_lockstep * lockstep) {
    delete lockstep;
}

int32_t adl_lockstep_begin(struct adl_lockstep * lockstep, struct llama_batch batch, const struct adl_row_params * rows, int32_t n_rows) {
    return with(lockstep, [&] { lockstep->begin(batch, rows, n_rows); });
}

int32_t adl_lockstep_end(struct adl_lockstep * lockstep, int32_t status, struct adl_row_result * results) {
    return with(lockstep, [&] {
        const auto copy = [&] {
            for (int32_t row = 0; results != nullptr && row < lockstep->n_rows(); ++row) {
                results[row] = lockstep->result(row);
            }
        };
        try {
            lockstep->end(status);
        } catch (...) {
            copy();
            throw;
        }
        copy();
    });
}

int32_t adl_lockstep_decode(
        struct adl_lockstep * lockstep, struct llama_batch batch, const struct adl_row_params * rows, int32_t n_rows,
        struct adl_row_result * results) {
    if (const int32_t error = adl_lockstep_begin(lockstep, batch, rows, n_rows)) {
        return error;
    }
    // An exception of llama.cpp's is a decode that failed in the middle.
    const int32_t status = adl::guarded<int32_t>(-3, [&] { return lockstep->pair.llama.llama_decode(lockstep->teacher, batch); });
    if (const int32_t error = adl_lockstep_end(lockstep, status, results)) {
        return error;
    }
    return status >= 0 ? status : adl::keep({ADL_ERROR_DECODE, format("llama_decode returned %d for the teacher; nothing can be sampled", status)});
}

double adl_lockstep_dose(const struct adl_lockstep * lockstep, int32_t row, llama_token token) {
    return lockstep->dose(row, token);
}

int32_t adl_lockstep_doses(
        struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_pos pos, const llama_token * tokens, size_t n_tokens, double * doses) {
    return with(lockstep, [&] {
        if ((tokens == nullptr || doses == nullptr) && n_tokens > 0) {
            throw Error{ADL_ERROR_INPUT, "adl_lockstep_doses: tokens or doses is NULL"};
        }
        lockstep->doses(seq_id, pos, tokens, n_tokens, doses);
    });
}

const float * adl_lockstep_get_logits(const struct adl_lockstep * lockstep, int32_t row, enum adl_sign sign) {
    return lockstep->logits(row, sign);
}

struct adl_lockstep_stats adl_lockstep_get_stats(const struct adl_lockstep * lockstep) {
    return lockstep->stats();
}

void adl_lockstep_memory_clear(struct adl_lockstep * lockstep) {
    lockstep->clear();
}

bool adl_lockstep_memory_seq_rm(struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return adl::guarded<bool>(false, [&] { return lockstep->seq_rm(seq_id, p0, p1); });
}

int32_t adl_lockstep_memory_seq_cp(
        struct adl_lockstep * lockstep, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    return with(lockstep, [&] { lockstep->seq_cp(src, dst, p0, p1); });
}

void adl_lockstep_memory_seq_keep(struct adl_lockstep * lockstep, llama_seq_id seq_id) {
    adl::guarded<int>(0, [&] { lockstep->seq_keep(seq_id); return 0; });
}

void adl_lockstep_close(const struct adl_lockstep * lockstep, int32_t n_rows) {
    lockstep->close(n_rows);
}

size_t adl_lockstep_get_tokens(
        const struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_token * tokens, llama_pos * pos, size_t capacity) {
    return lockstep->copy_tokens(seq_id, tokens, pos, capacity);
}

size_t adl_lockstep_n_held(const struct adl_lockstep * lockstep, llama_seq_id seq_id) {
    return lockstep->n_held(seq_id);
}

int32_t adl_lockstep_restore(
        struct adl_lockstep * lockstep, llama_seq_id seq_id, const llama_token * tokens, const llama_pos * pos, size_t n_tokens,
        size_t n_held) {
    return with(lockstep, [&] {
        if (tokens == nullptr && n_tokens > 0) {
            throw Error{ADL_ERROR_INPUT, "adl_lockstep_restore: tokens is NULL"};
        }
        lockstep->restore(seq_id, tokens, pos, n_tokens, n_held);
    });
}
