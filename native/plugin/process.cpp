#include "process.hpp"

#include "real.hpp"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

namespace plugin {

namespace {

// Where the program's errors went when it began. It may hide its own later, as llama-cpp-python does while it loads a model.
class Voice {
  public:
    Voice() : copy_(fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, FIRST)) { fstat(copy_, &begun_); }

    // A program that closed every descriptor may have put another file in the place of ours.
    int fd() const {
        struct stat now;
        return copy_ >= 0 && fstat(copy_, &now) == 0 && now.st_dev == begun_.st_dev && now.st_ino == begun_.st_ino ? copy_ : STDERR_FILENO;
    }

  private:
    static constexpr int FIRST = 64; // programs count on low numbers
    int                  copy_;
    struct stat          begun_ = {};
};

const Voice voice;

void say_line(const char * fmt, va_list arguments) {
    char line[2048];
    std::vsnprintf(line, sizeof line, fmt, arguments);
    dprintf(voice.fd(), "adlocal: %s\n", line);
}

const char * variable(const char * name) {
    const char * value = std::getenv(name);
    return value != nullptr && *value ? value : nullptr;
}

double number(const char * name, double otherwise) {
    const char * value = variable(name);
    if (value == nullptr) {
        return otherwise;
    }
    char *       end    = nullptr;
    const double result = std::strtod(value, &end);
    if (*end != '\0' || !std::isfinite(result)) {
        die("%s=%s: give a number", name, value);
    }
    return result;
}

std::vector<std::string> parts(const char * text, char separator) {
    std::vector<std::string> result;
    for (const char * from = text; from != nullptr && *from;) {
        const char * to = std::strchr(from, separator);
        result.emplace_back(from, to ? static_cast<size_t>(to - from) : std::strlen(from));
        from = to ? to + 1 : nullptr;
    }
    return result;
}

std::string canonical(const std::string & path) {
    char         resolved[PATH_MAX];
    const char * found = path.empty() ? nullptr : realpath(path.c_str(), resolved);
    return found ? found : path;
}

bool is_within(const std::string & path, const std::string & directory) {
    const std::string prefix = canonical(directory) + "/";
    return path.compare(0, prefix.size(), prefix) == 0;
}

} // namespace

void die(const char * fmt, ...) {
    va_list arguments;
    va_start(arguments, fmt);
    say_line(fmt, arguments);
    va_end(arguments);
    if (const Process * process = Process::existing()) {
        process->control().remove();
    }
    _exit(1);
}

void say(const char * fmt, ...) {
    va_list arguments;
    va_start(arguments, fmt);
    say_line(fmt, arguments);
    va_end(arguments);
}

Config Config::of_environment() {
    Config       config;
    const char * bundle = variable("ADLOCAL_BUNDLE");
    if (bundle == nullptr) {
        die("ADLOCAL_BUNDLE is not set, and without a bundle nothing can be protected; start the program with `adlocal run`");
    }
    config.bundle             = bundle;
    config.strength           = number("ADLOCAL_STRENGTH", 1.0);
    config.guard              = number("ADLOCAL_GUARD", 0.05);
    config.epsilon            = number("ADLOCAL_EPSILON", 0.0);
    config.proxy_threads      = static_cast<int32_t>(number("ADLOCAL_PROXY_THREADS", 0));
    config.proxy_n_gpu_layers = static_cast<int32_t>(number("ADLOCAL_PROXY_N_GPU_LAYERS", INT32_MIN));
    config.observe            = variable("ADLOCAL_OBSERVE") != nullptr;
    config.control_directory  = variable("ADLOCAL_CONTROL_DIR") ? variable("ADLOCAL_CONTROL_DIR") : "";
    config.allowed            = parts(variable("ADLOCAL_ALLOW_MODELS"), '\n');
    std::transform(config.allowed.begin(), config.allowed.end(), config.allowed.begin(), canonical);
    if (config.strength < 0 || config.guard < 0 || config.guard > 1) {
        die("ADLOCAL_STRENGTH=%g, ADLOCAL_GUARD=%g: give nats from 0 up, and a share from 0 to 1", config.strength, config.guard);
    }
    return config;
}

//
// Process
//

std::atomic<bool>      Process::has_protected_ = false;
std::atomic<Process *> Process::existing_      = nullptr;

Process & Process::get() {
    static Process & process = *new Process; // never destroyed: threads may run on while the program ends
    return process;
}

Process::Process() : config_(Config::of_environment()), control_(config_) {
    bundle_.size = sizeof bundle_;
    if (adl_bundle_read(&real().table, config_.bundle.c_str(), &bundle_) != ADL_OK) {
        die("%s", adl_last_error());
    }
    open_vocabulary();
    existing_ = this;
}

void Process::open_vocabulary() {
    const Real & r            = real();
    auto         params       = r.table.llama_model_default_params();
    params.vocab_only         = true;
    const std::string path    = config_.bundle + (bundle_.is_adapter ? "/proxy-base.gguf" : "/proxy-plus.gguf");
    vocabulary_               = r.table.llama_model_load_from_file(path.c_str(), params);
    if (vocabulary_ == nullptr) {
        die("%s: llama.cpp cannot read its vocabulary; its log says why", path.c_str());
    }
}

void Process::loaded(llama_model * model, const std::string & path, const llama_model_params & params) {
    const std::lock_guard<std::mutex> lock(mutex_);
    models_[model] = {canonical(path), params.no_alloc};
}

void Process::unloaded(llama_model * model) {
    const std::lock_guard<std::mutex> lock(mutex_);
    models_.erase(model);
}

bool Process::shares_vocabulary(const llama_model * model) {
    return adl_vocab_shared(&real().table, model, vocabulary_) >= 0;
}

Kind Process::kind(const llama_model * model, const llama_context_params & params) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto        found = models_.find(model);
    const std::string path  = found == models_.end() ? "" : found->second.path;
    if (params.ctx_type == LLAMA_CONTEXT_TYPE_MTP || (found != models_.end() && found->second.no_alloc)) {
        return Kind::LEFT_ALONE;
    }
    if (!path.empty() && (is_within(path, config_.bundle) || std::find(config_.allowed.begin(), config_.allowed.end(), path) != config_.allowed.end())) {
        return Kind::LEFT_ALONE;
    }
    if (shares_vocabulary(model)) {
        return Kind::PROTECTED;
    }
    if (params.embeddings) { // a model that embeds; it must not generate
        return Kind::CLOSED;
    }
    die("%s has another vocabulary than the bundle (%s), so its text cannot be protected; allow it with --allow-model",
        path.empty() ? "a model" : path.c_str(), adl_last_error());
}

adl_pair * Process::make_pair(llama_context * context, const llama_model * model, const llama_context_params & params) {
    const Real & r               = real();
    auto         pair            = adl_pair_default_params(&r.table);
    pair.context.n_ctx           = r.table.llama_n_ctx(context);
    pair.context.n_batch         = r.table.llama_n_batch(context);
    pair.context.n_seq_max       = r.llama_n_seq_max(context);
    pair.context.kv_unified      = r.llama_n_ctx_seq(context) == r.table.llama_n_ctx(context); // as the teacher's
    pair.context.n_outputs_max = pair.context.n_outputs_max_per_seq = std::max(64u, pair.context.n_seq_max);
    pair.context.n_threads       = config_.proxy_threads ? config_.proxy_threads : params.n_threads;
    pair.context.n_threads_batch = config_.proxy_threads ? config_.proxy_threads : params.n_threads_batch;
    pair.epsilon                 = config_.epsilon;
    if (config_.proxy_n_gpu_layers != INT32_MIN) {
        pair.model.n_gpu_layers = config_.proxy_n_gpu_layers;
    }
    return first_ ? adl_pair_init_from_pair(first_, model, pair) : adl_pair_init(&r.table, config_.bundle.c_str(), model, pair);
}

void Process::made(llama_context * context, const llama_model * model, const llama_context_params & params) {
    const std::lock_guard<std::mutex> lock(mutex_);
    adl_pair * pair = make_pair(context, model, params);
    if (pair == nullptr) {
        die("%s", adl_last_error());
    }
    first_ = first_ ? first_ : pair;
    auto made = std::make_unique<Context>(context, pair, params);
    memories_[made->memory] = made.get();
    contexts_[context]      = std::move(made);
    has_protected_          = true;
}

void Process::freed(llama_context * context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shut_.erase(context);
    const auto found = contexts_.find(context);
    if (found != contexts_.end()) {
        const bool is_first = found->second->pair() == first_;
        memories_.erase(found->second->memory);
        contexts_.erase(found);
        if (is_first) { // another one keeps the weights, if there is one
            first_ = contexts_.empty() ? nullptr : contexts_.begin()->second->pair();
        }
    }
}

void Process::shut(llama_context * context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shut_.insert(context);
}

bool Process::is_closed(const llama_context * context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return shut_.count(context) > 0;
}

Context * Process::find(const llama_context * context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = contexts_.find(context);
    return found == contexts_.end() ? nullptr : found->second.get();
}

Context * Process::find(llama_memory_t memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = memories_.find(memory);
    return found == memories_.end() ? nullptr : found->second;
}

//
// Context
//

Context::Context(llama_context * c, adl_pair * pair, const llama_context_params & params)
    : context(c), memory(real().table.llama_get_memory(c)), n_seq_max(real().llama_n_seq_max(c)), pair_(pair),
      lockstep_(adl_lockstep_init(pair, c, adl_lockstep_default_params())), embeddings_(params.embeddings) {
    if (lockstep_ == nullptr) {
        die("%s", adl_last_error());
    }
    const llama_vocab * vocab = real().table.llama_model_get_vocab(real().llama_get_model(c));
    sequences_.resize(n_seq_max);
    closed_.assign(static_cast<size_t>(real().table.llama_vocab_n_tokens(vocab)), -1e9f);
    for (size_t token = 0; token < closed_.size(); ++token) {
        if (real().table.llama_vocab_is_eog(vocab, static_cast<llama_token>(token))) {
            closed_[token] = 0.0f;
        }
    }
}

Context::~Context() {
    adl_lockstep_free(lockstep_);
    adl_pair_free(pair_);
}

void Context::poison(const char * why) {
    say("%s; the context is closed until its memory is cleared", why);
    poisoned_ = true;
    readable_ = false;
}

void Context::clear() {
    adl_lockstep_memory_clear(lockstep_);
    sequences_.assign(n_seq_max, {});
    poisoned_ = readable_ = false;
}

bool Context::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    for (llama_seq_id each = 0; has(each); ++each) {
        const llama_pos last = pos_max(each);
        if ((seq_id < 0 || each == seq_id) && (p1 < 0 || p1 > last) && p0 <= std::min(last, sequences_[each].draft)) {
            begin(each);
        }
    }
    return adl_lockstep_memory_seq_rm(lockstep_, seq_id, p0, p1);
}

void Context::seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    if (adl_lockstep_memory_seq_cp(lockstep_, source, target, p0, p1) != ADL_OK) {
        return poison(adl_last_error());
    }
    if (has(source) && has(target)) {
        sequences_[target] = sequences_[source];
        Process::get().control().copy(source, target);
    }
}

void Context::seq_keep(llama_seq_id seq_id) {
    adl_lockstep_memory_seq_keep(lockstep_, seq_id);
    for (llama_seq_id other = 0; has(other); ++other) {
        if (other != seq_id) {
            begin(other);
        }
    }
}

// Whoever was given rows to sample from and now reads a token without one reads a prompt: the next request.
void Context::notice_prompts(const std::vector<Rows::Token> & tokens) {
    for (const Rows::Token & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            if (has(seq_id) && token.row < 0 && sequences_[seq_id].has_rows) {
                begin(seq_id);
            }
        }
    }
}

// Sampled and drafted tokens all have rows, and those of a prompt have not.
void Context::note(const std::vector<Rows::Token> & tokens) {
    std::set<llama_seq_id> seen;
    for (const Rows::Token & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            Sequence & sequence = sequences_[seq_id];
            const bool is_first = seen.insert(seq_id).second;
            if (is_first || token.row < 0 || !sequence.has_rows) {
                sequence.draft = token.pos;
            }
            sequence.has_rows = (sequence.has_rows && !is_first) || token.row >= 0;
        }
    }
}

llama_pos Context::pos_max(llama_seq_id seq_id) const {
    return !has(seq_id) ? -1 : real().table.llama_memory_seq_pos_max(memory, seq_id);
}

// NULL for a sequence that llama.cpp will refuse.
const Latched * Context::latched(llama_seq_id seq_id) {
    if (!has(seq_id)) {
        return nullptr;
    }
    auto & latched = sequences_[seq_id].latched;
    if (!latched) {
        latched = Process::get().control().latch(seq_id);
    }
    return &*latched;
}

// A row of several sequences is protected as the one that asks for most.
Context::Asked Context::ask(const std::vector<Rows::Token> & tokens) {
    Asked asked;
    for (const Rows::Token & token : tokens) {
        std::optional<Latched> row;
        for (const llama_seq_id seq_id : token.seq_ids) {
            if (const Latched * each = latched(seq_id)) {
                row                  = row ? *row : *each;
                row->closed          = row->closed || each->closed;
                row->params.strength = std::max(row->params.strength, each->params.strength);
                row->params.guard    = std::min(row->params.guard, each->params.guard);
                row->params.mode     = std::max(row->params.mode, each->params.mode);
            }
        }
        if (token.row >= 0) {
            asked.params.push_back(row ? row->params : Process::get().control().floor());
            if (row && row->closed) {
                asked.closed.push_back(token.row);
            }
        }
    }
    return asked;
}

void Context::close(const Asked & asked) const {
    float * const logits = asked.closed.empty() ? nullptr : real().table.llama_get_logits(context);
    for (const int32_t row : asked.closed) {
        std::copy(closed_.begin(), closed_.end(), logits + static_cast<size_t>(row) * closed_.size());
    }
}

//
// Counters
//

// The doses of the tokens that came after the rows of the last step.
void Context::count_doses(const std::vector<Rows::Token> & next) const {
    rows_.follow(next, [this](llama_seq_id seq_id, int32_t row, llama_token token) {
        const double dose = adl_lockstep_dose(lockstep_, row, token);
        if (std::isfinite(dose)) {
            adl_control_counters & counters = Process::get().control().counters(seq_id);
            counters.dose += dose;
            ++counters.n_dosed;
        }
    });
}

void Context::count(const std::vector<Rows::Token> & tokens, const std::vector<adl_row_result> & results) const {
    for (const Rows::Token & token : tokens) {
        if (token.row < 0) {
            continue;
        }
        const adl_row_result & result   = results[static_cast<size_t>(token.row)];
        adl_control_counters & counters = Process::get().control().counters(token.seq_ids[0]);
        const Latched &        latched  = *sequences_[token.seq_ids[0]].latched;
        counters.n_rows += 1;
        counters.n_choices += result.n_candidates > 1;
        counters.n_evaluated += result.evaluated;
        counters.n_closed += result.closed || latched.closed;
        counters.kl += result.kl;
    }
}

} // namespace plugin
