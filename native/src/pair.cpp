#include "pair.hpp"

#include "error.hpp"
#include "llama_table.hpp"
#include "vocabulary.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>

namespace adl {

namespace {

// Tokens. The blocks in which kernels take rows are powers of two up to 16.
constexpr size_t BLOCK = 32;

int32_t n_outputs(const llama_batch & batch) {
    if (batch.logits == nullptr) {
        return 1; // llama.h: only the last token is output
    }
    return static_cast<int32_t>(batch.n_tokens - std::count(batch.logits, batch.logits + batch.n_tokens, 0));
}

double checked_positive(const char * name, double value) {
    if (!(std::isfinite(value) && value > 0)) {
        throw Error{ADL_ERROR_INPUT, format("%s=%g: give a positive number", name, value)};
    }
    return value;
}

// ε as llama.cpp takes an adapter's scale, in float32.
double checked_scale(double epsilon) {
    checked_positive("epsilon", epsilon);
    if (epsilon < std::numeric_limits<float>::min() || epsilon > std::numeric_limits<float>::max()) {
        throw Error{ADL_ERROR_INPUT, format("epsilon=%g is beyond the numbers of float32; give one that an adapter can be scaled by", epsilon)};
    }
    return epsilon;
}

} // namespace

// The ε in force: the bundle's, or the one that was asked for.
double chosen_epsilon(double bundles, double asked_for, bool is_adapter) {
    checked_positive("epsilon", bundles);
    if (asked_for != 0 && !is_adapter && checked_positive("epsilon", asked_for) != bundles) {
        throw Error{ADL_ERROR_INPUT, format("epsilon=%g: these halves were written at %g, which cannot be changed; "
                                            "leave it out, or convert to an adapter bundle",
                                            asked_for, bundles)};
    }
    const double epsilon = asked_for != 0 ? asked_for : bundles;
    return is_adapter ? checked_scale(epsilon) : epsilon;
}

namespace {

// Left to choose, llama.cpp takes flash attention, which on a CPU gives a row that depends on the length of the batch that it
// was evaluated in: a prompt that is cached and a fresh one would not give the same. A quantized V cache cannot do without.
llama_context_params with_attention(const adl_llama & llama, const adl_pair_params & params) {
    llama_context_params context = params.context;
    const bool           on_cpu  = params.model.n_gpu_layers == 0 || !llama.llama_supports_gpu_offload();
    const bool           is_free = context.type_v == GGML_TYPE_F32 || context.type_v == GGML_TYPE_F16;
    if (on_cpu && is_free && context.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    return context;
}

} // namespace

} // namespace adl

using adl::Error;
using adl::format;

adl_pair::adl_pair(const adl_llama & table, std::shared_ptr<const adl::Weights> computed_with, double eps, double delta,
                   const llama_model * teacher, const adl_pair_params & params)
    : llama(table), epsilon(adl::chosen_epsilon(eps, params.epsilon, computed_with->adapter() != nullptr)),
      delta_scale(teacher ? adl::checked_positive("delta_scale", delta) : delta), weights(std::move(computed_with)),
      plus(llama, weights->plus(), adl::with_attention(llama, params)), minus(llama, weights->minus(), adl::with_attention(llama, params)),
      n_vocab(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(plus.model.handle))),
      n_shared(teacher ? adl::shared_vocabulary(llama, teacher, plus.model.handle) : 0),
      n_vocab_teacher(teacher ? llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(teacher)) : 0),
      teacher_ends(teacher ? adl::end_tokens(llama, llama.llama_model_get_vocab(teacher)) : std::vector<llama_token>()),
      n_batch_(static_cast<int32_t>(llama.llama_n_batch(plus.context))),
      n_ubatch_(params.context.n_ubatch ? std::min(n_batch_, static_cast<int32_t>(params.context.n_ubatch)) : n_batch_),
      n_ctx_train_(llama.llama_model_n_ctx_train(plus.model.handle)), n_swa_(llama.llama_model_n_swa(plus.model.handle)),
      is_shared_(llama.llama_n_ctx(plus.context) > static_cast<uint32_t>(n_ctx_train_)),
      n_outputs_max_(params.context.n_outputs_max ? static_cast<int32_t>(params.context.n_outputs_max) : n_batch_),
      concurrency_(llama, params, plus.context, minus.context) {
    attach();
}

// Sets the adapter's scales where they are not: when the pair is made, at another ε, and after llama.cpp has refused one.
void adl_pair::attach() {
    if (weights->adapter() != nullptr && !attached_) {
        scale(plus, epsilon);
        scale(minus, -epsilon);
        attached_ = true;
    }
}

void adl_pair::scale(const adl::Proxy & proxy, double value) {
    llama_adapter_lora * adapter = weights->adapter();
    auto                 factor  = static_cast<float>(value);
    const int32_t        code    = llama.llama_set_adapters_lora(proxy.context, &adapter, 1, &factor);
    if (code != 0) {
        throw Error{ADL_ERROR_PROXY, format("llama.cpp cannot attach the adapter at ε=%g: llama_set_adapters_lora returned %d", value, code)};
    }
}

void adl_pair::set_epsilon(double value) {
    if (weights->adapter() == nullptr) {
        throw Error{ADL_ERROR_INPUT, format("epsilon=%g: these halves were written at %g, which cannot be changed; convert to an adapter bundle",
                                            value, epsilon)};
    }
    const double before = std::exchange(epsilon, adl::checked_scale(value));
    clear();
    attached_ = false;
    try {
        attach();
    } catch (...) {
        epsilon = before;
        throw;
    }
}

int32_t adl_pair::decode(const llama_batch & batch) {
    if (*error) {
        throw Error{ADL_ERROR_PROXY, error};
    }
    n_rows_  = 0;
    follows_ = false;
    ++serial_;
    try {
        check(batch);
        attach();
        evaluate(batch);
        const int32_t n = adl::n_outputs(batch);
        rows_.assign(n, {std::numeric_limits<double>::quiet_NaN(), 0.0, 0});
        return n_rows_ = n;
    } catch (const Error & failure) {
        stick("%s", failure.message.c_str());
        throw;
    } catch (const std::bad_alloc &) {
        stick("%s", "a proxy could not be evaluated: out of memory; no token was emitted");
        throw;
    } catch (const std::exception & failure) {
        stick("a proxy could not be evaluated: %s; no token was emitted", failure.what());
        throw;
    } catch (...) {
        stick("%s", "a proxy could not be evaluated: llama.cpp threw an unknown exception; no token was emitted");
        throw;
    }
}

void adl_pair::stick(const char * fmt, const char * words) noexcept {
    std::snprintf(error, sizeof error, fmt, words);
}

// What llama.cpp would refuse with a number, or end the process for.
void adl_pair::check(const llama_batch & batch) const {
    if (batch.token == nullptr) {
        throw Error{ADL_ERROR_PROXY, "the batch holds embeddings (multimodal input does), which the proxies cannot evaluate; give tokens"};
    }
    if (batch.n_tokens < 1 || batch.n_tokens > n_batch_) {
        throw Error{ADL_ERROR_PROXY, format("a batch of %d tokens, expected 1 to n_batch=%d of the pair", batch.n_tokens, n_batch_)};
    }
    if (adl::n_outputs(batch) > n_outputs_max_) {
        throw Error{ADL_ERROR_PROXY, format("the batch asks for %d rows of logits; make the pair with a larger n_outputs_max than %d",
                                            adl::n_outputs(batch), n_outputs_max_)};
    }
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.token[i] < 0 || batch.token[i] >= n_vocab) {
            throw Error{ADL_ERROR_PROXY, format("token %d is none of the proxy's %d; no token was emitted", batch.token[i], n_vocab)};
        }
        if (batch.pos != nullptr && batch.pos[i] >= n_ctx_train_ && is_shared_) {
            throw Error{ADL_ERROR_PROXY, format("position %d is beyond the %d tokens that the proxy was trained for; give the teacher a "
                                                "smaller context, or convert a proxy with a longer one", batch.pos[i], n_ctx_train_)};
        }
    }
}

void adl_pair::evaluate(const llama_batch & batch) {
    int32_t    code_plus = 0, code_minus = 0;
    const auto decode_plus  = [&] { code_plus = llama.llama_decode(plus.context, batch); };
    const auto decode_minus = [&] { code_minus = llama.llama_decode(minus.context, batch); };
    concurrency_.run(batch.n_tokens == 1, decode_plus, decode_minus);
    check_code(code_plus, "+ε");
    check_code(code_minus, "−ε");
}

void adl_pair::check_code(int32_t code, const char * which) const {
    if (code == 0) {
        return;
    }
    const std::string why = code == 1 ? format(": no room in its context of %u tokens; ask for a larger n_ctx", llama.llama_n_ctx(plus.context))
                                      : std::string();
    throw Error{ADL_ERROR_PROXY,
                format("the proxy at %s could not be evaluated: llama_decode returned %d%s; no token was emitted", which, code, why.c_str())};
}

void adl_pair::follow(const std::vector<llama_token> & tokens, size_t n_prompt) {
    const size_t n = tokens.size(), unit = n_ubatch();
    for (size_t done = keep_prefix(tokens, n_prompt); done < n;) {
        const bool   in_prompt = done + 1 < n_prompt;
        const size_t chunk     = std::min(in_prompt ? n_prompt - 1 : n, (done / unit + 1) * unit) - done;
        append(tokens.data() + done, chunk, done + chunk == n);
        done += chunk;
        n_canonical_ = in_prompt && done - chunk == n_canonical_ ? done : n_canonical_;
    }
}

// Drops what is of no use for `tokens`, and at least the last one, whose row is wanted. Returns how many are left.
size_t adl_pair::keep_prefix(const std::vector<llama_token> & tokens, size_t n_prompt) {
    if (*error || !follows_) {
        clear();
    }
    const auto   end  = std::mismatch(tokens_.begin(), tokens_.begin() + std::min(tokens_.size(), tokens.size() - 1), tokens.begin()).first;
    const size_t keep = reusable(end - tokens_.begin(), n_prompt);
    if (keep == tokens_.size()) {
        return keep;
    }
    if (keep == 0 || !seq_rm(0, static_cast<llama_pos>(keep), -1)) {
        clear(); // recurrent memory cannot forget a part
        return 0;
    }
    tokens_.resize(keep);
    n_canonical_ = std::min(n_canonical_, keep);
    follows_     = true;
    return keep;
}

// How many of the tokens in common give the rows that a fresh pair would: all where the prompt is the same, else whole blocks of
// what was evaluated as a prompt. A prompt that goes on from what was sampled keeps all. adlocal/engine/prefix.py says why.
size_t adl_pair::reusable(size_t n_common, size_t n_prompt) const {
    const size_t end = n_prompt > 0 ? n_prompt - 1 : 0, n = std::min(n_common, end);
    if (n_canonical_ == end && n == end) {
        return n_common;
    }
    if (n >= n_canonical_ + adl::BLOCK) {
        return n_common;
    }
    const size_t unit = n_ubatch(), block = std::min(adl::BLOCK, unit), fresh = std::min(n, n_canonical_);
    size_t       aligned = fresh - fresh % unit % block;
    if (end - aligned == 1 && aligned % unit != 0) { // which a fresh pair would not evaluate alone
        aligned -= block;
    }
    return aligned;
}

// Decodes tokens that continue sequence 0; a row of the last, if any.
void adl_pair::append(const llama_token * tokens, size_t n, bool output) {
    std::vector<llama_token>    token(tokens, tokens + n);
    std::vector<llama_pos>      pos(n);
    std::vector<int32_t>        n_seq_id(n, 1);
    llama_seq_id                zero = 0;
    std::vector<llama_seq_id *> seq_id(n, &zero);
    std::vector<int8_t>         logits(n, 0);
    for (size_t i = 0; i < n; ++i) {
        pos[i] = static_cast<llama_pos>(tokens_.size() + i);
    }
    logits.back() = output;
    tokens_.insert(tokens_.end(), tokens, tokens + n);
    decode({static_cast<int32_t>(n), token.data(), nullptr, pos.data(), n_seq_id.data(), seq_id.data(), logits.data()});
    follows_ = true;
}

void adl_pair::clear() noexcept {
    llama.llama_memory_clear(plus.memory, true);
    llama.llama_memory_clear(minus.memory, true);
    tokens_.clear();
    n_canonical_ = 0;
    follows_     = true;
    n_rows_  = 0;
    *error   = '\0';
    ++serial_;
}

bool adl_pair::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    touch();
    if (n_swa_ > 0 && p0 > 0 && (seq_id < 0 || (p0 <= llama.llama_memory_seq_pos_max(plus.memory, seq_id) && !remembers(seq_id, 0, p0)))) {
        return false;
    }
    const bool removed_plus = llama.llama_memory_seq_rm(plus.memory, seq_id, p0, p1);
    return llama.llama_memory_seq_rm(minus.memory, seq_id, p0, p1) && removed_plus;
}

// Is all there that a token at `next` looks back at, in a sequence from `first` on? Recurrent memory has the state at its end
// alone. A sliding window that shares cells with other sequences has given away those that it had left behind, swa_full or not.
bool adl_pair::remembers(llama_seq_id seq_id, llama_pos first, llama_pos next) const {
    const llama_pos from  = n_swa_ > 0 ? std::max(first, next - n_swa_ + 1) : first;
    const auto      holds = [&](const adl::Proxy & proxy) {
        const llama_pos held = llama.llama_memory_seq_pos_min(proxy.memory, seq_id); // and all from there on
        return held >= 0 && held <= from;
    };
    return holds(plus) && holds(minus);
}

void adl_pair::seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    touch();
    llama.llama_memory_seq_cp(plus.memory, source, target, p0, p1);
    llama.llama_memory_seq_cp(minus.memory, source, target, p0, p1);
}

void adl_pair::seq_keep(llama_seq_id seq_id) {
    touch();
    llama.llama_memory_seq_keep(plus.memory, seq_id);
    llama.llama_memory_seq_keep(minus.memory, seq_id);
}

void adl_pair::touch() noexcept {
    n_rows_  = 0;
    follows_ = false;
    ++serial_;
}

const float * adl_pair::logits(const adl::Proxy & proxy) {
    return n_rows_ > 0 ? llama.llama_get_logits(proxy.context) : nullptr;
}

void adl_pair::adjust(float * logits, int32_t n_rows, const double * strength, const double * guard, adl_row * rows) {
    if (n_vocab_teacher == 0) {
        throw Error{ADL_ERROR_INPUT, "this pair was made without a teacher and adjusts nothing; give the teacher's model when making it"};
    }
    if (logits == nullptr) {
        throw Error{ADL_ERROR_INPUT, "adl_pair_adjust: logits is NULL"};
    }
    try {
        if (strength == nullptr || guard == nullptr || rows == nullptr) {
            throw Error{ADL_ERROR_INPUT, "adl_pair_adjust: strength, guard or rows is NULL"};
        }
        if (n_rows < 1 || n_rows != n_rows_) {
            throw Error{ADL_ERROR_PROXY, format("%d rows to adjust, and the pair has evaluated %d; decode the teacher's batch in the pair first",
                                                n_rows, n_rows_)};
        }
        for (int32_t row = 0; row < n_rows; ++row) {
            adjust_row(logits + static_cast<size_t>(row) * n_vocab_teacher, row, strength[row], guard[row]);
        }
        std::copy_n(rows_.begin(), n_rows, rows);
    } catch (...) {
        for (int32_t row = 0; row < n_rows; ++row) {
            close_row(logits + static_cast<size_t>(row) * n_vocab_teacher);
        }
        throw;
    }
}

adl_row adl_pair::adjust_row(float * row_logits, int32_t row, double strength, double guard) {
    adl::check_strength(strength, guard);
    const double mean = expectation(row);
    return rows_[row] = adl::adjust(row_logits, n_vocab_teacher, proxies(row), n_shared, {epsilon, lam(strength), guard}, ends(), mean);
}

int32_t adl_pair::n_candidates(const float * logits, double guard) const {
    return adl::n_candidates(logits, n_vocab_teacher, n_shared, guard, ends());
}

double adl_pair::expectation(int32_t row) {
    return adl::expectation(proxies(row), epsilon);
}

adl::Evaluated adl_pair::copy_row(int32_t row, double mean) {
    const adl::Proxies both = proxies(row);
    return {{both.plus, both.plus + both.n}, {both.minus, both.minus + both.n}, mean, epsilon};
}

adl::Proxies adl_pair::proxies(int32_t row) {
    const size_t first = static_cast<size_t>(row) * n_vocab;
    return {logits(plus) + first, logits(minus) + first, n_vocab};
}

void adl_pair::close_row(float * logits) const noexcept {
    std::fill_n(logits, n_vocab_teacher, adl::CLOSED);
    for (const llama_token token : teacher_ends) {
        logits[token] = 0.0f;
    }
}

double adl_pair::dose(int32_t row, llama_token token) noexcept {
    if (row < 0 || row >= n_rows_ || token < 0) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const adl::Proxies both = proxies(row);
    if (std::isnan(rows_[row].mean)) { // not adjusted
        rows_[row].mean = expectation(row);
    }
    return adl::dose(both, token, epsilon, rows_[row].mean);
}
