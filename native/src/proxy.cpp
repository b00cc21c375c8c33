#include "proxy.hpp"

#include "error.hpp"
#include <algorithm>

#include <mutex>

namespace adl {

namespace {

// llama.cpp registers backends and devices while it loads, without locks: one model or context at a time.
std::mutex creation;

llama_model * load(const adl_llama & llama, const std::string & path, const llama_model_params & params) {
    const std::lock_guard<std::mutex> lock(creation);
    return llama.llama_model_load_from_file(path.c_str(), params);
}

} // namespace

Model::Model(const adl_llama & llama, const std::string & file, const llama_model_params & params)
    : path(file), handle(load(llama, file, params)), llama_(llama) {
    if (handle == nullptr) {
        throw Error{ADL_ERROR_MODEL, format("%s: llama.cpp cannot load this proxy; its log says why", path.c_str())};
    }
}

Model::~Model() {
    const std::lock_guard<std::mutex> lock(creation);
    llama_.llama_model_free(handle);
}

llama_adapter_lora * Model::load_adapter(const std::string & file) const {
    const std::lock_guard<std::mutex> lock(creation);
    llama_adapter_lora * adapter = llama_.llama_adapter_lora_init(handle, file.c_str());
    if (adapter == nullptr) {
        throw Error{ADL_ERROR_MODEL, format("%s: llama.cpp cannot load this adapter for %s; its log says why", file.c_str(), path.c_str())};
    }
    return adapter;
}

Weights::Weights(const adl_llama & llama, const Source & source, const llama_model_params & params)
    : first_(llama, source.first, params), second_(source.is_adapter ? nullptr : std::make_unique<const Model>(llama, source.second, params)),
      adapter_(source.is_adapter ? first_.load_adapter(source.second) : nullptr) {
    const auto n_vocab = [&](const Model & model) { return llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model.handle)); };
    if (n_vocab(plus()) != n_vocab(minus())) {
        throw Error{ADL_ERROR_BUNDLE, format("%s and %s have vocabularies of different sizes; convert again", source.first.c_str(),
                                             source.second.c_str())};
    }
}

Proxy::Proxy(const adl_llama & llama, const Model & weights, const llama_context_params & params) : model(weights), llama_(llama) {
    const uint32_t n_ctx_train = static_cast<uint32_t>(llama_.llama_model_n_ctx_train(model.handle));
    const uint32_t n_sequences = std::max(1u, params.n_seq_max); // which share n_ctx
    if (const uint32_t n_ctx_seq = params.n_ctx / n_sequences; n_ctx_seq > n_ctx_train) {
        throw Error{ADL_ERROR_MODEL, format("n_ctx=%u exceeds the %u tokens that the proxy was trained for; "
                                            "ask for a smaller n_ctx, or convert a proxy with a longer context",
                                            n_ctx_seq, n_ctx_train)};
    }
    const std::lock_guard<std::mutex> lock(creation);
    context = llama_.llama_init_from_model(model.handle, params);
    memory  = context ? llama_.llama_get_memory(context) : nullptr;
    if (memory == nullptr) {
        if (context != nullptr) {
            llama_.llama_free(context);
        }
        throw Error{ADL_ERROR_MODEL, format("%s: llama.cpp cannot make a context of n_ctx=%u, n_batch=%u for this proxy; its log says why",
                                            model.path.c_str(), params.n_ctx, params.n_batch)};
    }
}

Proxy::~Proxy() {
    const std::lock_guard<std::mutex> lock(creation);
    llama_.llama_free(context);
}

} // namespace adl
