#include "process.hpp"

#include "real.hpp"

#include <algorithm>
#include <climits>

namespace plugin {

namespace {

bool is_within(const std::string & path, const std::string & directory) {
    const std::string prefix = canonical(directory) + "/";
    return path.compare(0, prefix.size(), prefix) == 0;
}

} // namespace

std::atomic<bool> Process::has_protected_ = false;

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

} // namespace plugin
