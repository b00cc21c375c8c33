// Models and contexts are made and freed.

#include "guard.hpp"

using plugin::Kind;
using plugin::Process;
using plugin::real;

namespace {

llama_model * loaded(llama_model * model, const char * path, const llama_model_params & params) {
    if (model != nullptr) {
        Process::get().loaded(model, path ? path : "", params);
    }
    return model;
}

} // namespace

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

ADL_GUARD llama_context * adl_guarded_init(llama_model * model, plugin::HostContextParams host) ADL_LABEL("llama_init_from_model");
ADL_GUARD llama_context * adl_guarded_new(llama_model * model, plugin::HostContextParams host) ADL_LABEL("llama_new_context_with_model");

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
