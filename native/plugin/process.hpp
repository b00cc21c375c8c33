// What the plugin knows of the process that it lives in: the models and the contexts.

#pragma once

#include "adlocal.h"
#include "config.hpp"
#include "context.hpp"
#include "control.hpp"
#include "llama.h"

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

namespace plugin {

enum class Kind { PROTECTED, LEFT_ALONE, CLOSED };

class Process {
  public:
    static Process & get();

    const Config & config() const { return config_; }
    Control &      control() { return control_; }

    // A model that was loaded from a path, "" where it is not known.
    void loaded(llama_model * model, const std::string & path, const llama_model_params & params);
    void unloaded(llama_model * model);

    // What becomes of a context of the model. Ends the process where the model may not generate.
    Kind kind(const llama_model * model, const llama_context_params & params);

    void made(llama_context * context, const llama_model * model, const llama_context_params & params);
    void freed(llama_context * context);
    void shut(llama_context * context);

    // NULL where it is no context of a protected model's.
    Context * find(const llama_context * context);
    Context * find(llama_memory_t memory);

    // Whether a context's logits are closed because its model has another vocabulary.
    bool is_closed(const llama_context * context);

    // Whether a context was ever protected, in a process that may never have asked for llama.cpp.
    static bool has_protected() { return has_protected_; }

  private:
    Process();

    struct Model {
        std::string path;
        bool        no_alloc;
    };

    adl_pair * make_pair(llama_context * context, const llama_model * model, const llama_context_params & params);
    bool       shares_vocabulary(const llama_model * model);
    void       open_vocabulary();

    const Config                                          config_;
    Control                                               control_;
    std::mutex                                            mutex_;
    std::map<const llama_model *, Model>                  models_;
    std::map<const llama_context *, std::unique_ptr<Context>> contexts_;
    std::map<llama_memory_t, Context *>                   memories_;
    std::set<const llama_context *>                       shut_;
    adl_bundle                                            bundle_ = {};
    llama_model *                                         vocabulary_ = nullptr; // the bundle's, without weights
    adl_pair *                                            first_ = nullptr;      // keeps the pair's weights
    static std::atomic<bool>                              has_protected_;
};

} // namespace plugin
