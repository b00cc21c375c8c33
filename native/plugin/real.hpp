// llama.cpp's own functions, in whichever object of the process they lie.

#pragma once

#include "adlocal.h"
#include "fates.hpp"
#include "layout.hpp"
#include "llama.h"

#include <string>

namespace plugin {

// The functions that the plugin stands in for, and those that it needs besides. A member is NULL where this llama.cpp has none.
struct Real {
#define ADL_MEMBER(name, fate) decltype(&::name) name = nullptr;
    ADL_GUARDED(ADL_MEMBER)
#undef ADL_MEMBER
    decltype(&::llama_n_seq_max)           llama_n_seq_max           = nullptr;
    decltype(&::llama_n_ctx_seq)           llama_n_ctx_seq           = nullptr;
    decltype(&::llama_get_model)           llama_get_model           = nullptr;
    decltype(&::llama_pooling_type)        llama_pooling_type        = nullptr;
    decltype(&::llama_model_has_encoder)   llama_model_has_encoder   = nullptr;

    HostInit     init     = nullptr; // llama_init_from_model and llama_context_default_params, in the host's layout
    HostDefaults defaults = nullptr;
    Layout       layout;

    adl_llama   table = {}; // the core's, in ours
    std::string path;       // of the object
};

// Finds them once. Ends the process in words where there is no llama.cpp that this library knows.
const Real & real();

} // namespace plugin
