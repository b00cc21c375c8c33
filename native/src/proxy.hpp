// What the pair's two contexts compute with, and who frees it.

#pragma once

#include "adlocal.h"

#include <memory>
#include <string>

namespace adl {

// Loaded weights. llama.cpp frees the adapters that were loaded for them with them.
class Model {
  public:
    Model(const adl_llama & llama, const std::string & path, const llama_model_params & params);
    ~Model();
    Model(const Model &)             = delete;
    Model & operator=(const Model &) = delete;

    llama_adapter_lora * load_adapter(const std::string & path) const;

    const std::string   path;
    llama_model * const handle;

  private:
    const adl_llama llama_; // a copy: pairs share weights, and any of them may go first
};

// The files that a pair is made of: plus and minus half, or base and adapter.
struct Source {
    std::string first;
    std::string second;
    bool        is_adapter;
};

// What both proxies compute with: a model each, or one and the adapter that moves it to either side. The adapter is loaded
// before any context is made, because llama.cpp sizes contexts for the adapters that are there.
class Weights {
  public:
    Weights(const adl_llama & llama, const Source & source, const llama_model_params & params);

    const Model & plus() const { return first_; }
    const Model & minus() const { return second_ ? *second_ : first_; }
    llama_adapter_lora * adapter() const { return adapter_; } // NULL for halves

  private:
    const Model                        first_;
    const std::unique_ptr<const Model> second_; // NULL where there is an adapter
    llama_adapter_lora * const         adapter_;
};

// One proxy: a context over a model that outlives it.
class Proxy {
  public:
    Proxy(const adl_llama & llama, const Model & model, const llama_context_params & params);
    ~Proxy();
    Proxy(const Proxy &)             = delete;
    Proxy & operator=(const Proxy &) = delete;

    const Model &   model;
    llama_context * context = nullptr;
    llama_memory_t  memory  = nullptr;

  private:
    const adl_llama & llama_;
};

} // namespace adl
