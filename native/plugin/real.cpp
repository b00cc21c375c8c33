#include "real.hpp"

#include "config.hpp"
#include "objects.hpp"
#include "system.hpp"

#include <cstddef>
#include <cstring>
#include <dlfcn.h>
#include <set>
#include <vector>

namespace plugin {

namespace {

// An object of the process that defines llama.cpp and is not this library.
struct Found {
    void *      handle = nullptr;
    std::string path;
};

std::vector<Found> find_llamas() {
    std::vector<Found> found;
    std::set<void *>   bases = {own_base()};
    for (const std::string & name : loaded_objects()) {
        const auto where = llama_through(name);
        if (where && bases.insert(where->dli_fbase).second) {
            void * const own = dlopen(where->dli_fname, RTLD_LAZY | RTLD_NOLOAD);
            found.push_back({own ? own : dlopen(nullptr, RTLD_LAZY), where->dli_fname}); // the program itself has no other handle
        }
    }
    return found;
}

// A structure that a function of the host's returns by value: what it leaves untouched over two fill patterns is beyond it.
struct Padded {
    unsigned char bytes[4096];
};

// The caller hands over the place of a large result, as a hidden first argument or in a register of its own: whatever is
// written there is the host's.
void call_into(void * function, Padded * place) {
#if defined(__aarch64__)
    register Padded * x8 __asm__("x8") = place;
    __asm__ volatile("blr %1"
                     : "+r"(x8)
                     : "r"(function)
                     : "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x30",
                       "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25",
                       "v26", "v27", "v28", "v29", "v30", "v31", "memory", "cc");
#else
    reinterpret_cast<Padded * (*)(Padded *)>(function)(place);
#endif
}

size_t measured(void * function) {
    size_t size = 0;
    for (const unsigned char fill : {0xA5, 0x5A}) {
        Padded result;
        std::memset(&result, fill, sizeof result);
        call_into(function, &result);
        for (size_t i = sizeof result.bytes; i > size; --i) {
            if (result.bytes[i - 1] != fill) {
                size = i;
                break;
            }
        }
    }
    return size;
}

[[noreturn]] void refuse(const std::string & path, const char * name, size_t hosts, size_t ours) {
    die("%s: struct %s has %zu bytes there, and adlocal knows %zu; run `adlocal plugin build --include DIR` with the directory of its "
        "llama.h", path.c_str(), name, hosts, ours);
}

// Padding at the end of a structure is not written.
void check_model_params(void * function, const std::string & path) {
    const size_t hosts = measured(function), ours = sizeof(llama_model_params);
    if (hosts > ours || hosts + alignof(max_align_t) <= ours) {
        refuse(path, "llama_model_params", hosts, ours);
    }
}

// The core's table has our layout: what it calls is translated.
llama_context_params defaults_in_ours() {
    return real().layout.to_ours(real().defaults());
}

llama_context * init_in_ours(llama_model * model, llama_context_params params) {
    HostContextParams host = real().defaults();
    real().layout.to_host(params, host);
    return real().init(model, host);
}

void translate(Real & r) {
    auto * const defaults = reinterpret_cast<void *>(r.table.llama_context_default_params);
    const size_t size     = measured(defaults);
    if (!Layout::of_size(size, r.layout)) {
        refuse(r.path, "llama_context_params", size, sizeof(llama_context_params));
    }
    r.defaults = reinterpret_cast<HostDefaults>(defaults);
    r.init     = reinterpret_cast<HostInit>(reinterpret_cast<void *>(r.table.llama_init_from_model));
    r.table.llama_context_default_params = defaults_in_ours;
    r.table.llama_init_from_model        = init_in_ours;
}

template <typename Function>
void resolve(void * handle, const char * name, Function & function) {
    function = reinterpret_cast<Function>(find_symbol(handle, name));
}

Real make() {
    const std::vector<Found> all = find_llamas();
    if (all.empty()) {
        die("a function of llama.cpp was called, and no loaded object defines llama.cpp; it cannot be protected");
    }
    if (all.size() > 1) {
        die("two llama.cpps are loaded, %s and %s, and one can be protected; load one of them alone", all[0].path.c_str(), all[1].path.c_str());
    }
    const Found & found = all[0];
    Real r;
    r.path = found.path;
#define RESOLVE(name, fate) resolve(found.handle, #name, r.name);
    ADL_GUARDED(RESOLVE)
    resolve(found.handle, "llama_n_seq_max", r.llama_n_seq_max);
    resolve(found.handle, "llama_n_ctx_seq", r.llama_n_ctx_seq);
    resolve(found.handle, "llama_get_model", r.llama_get_model);
    resolve(found.handle, "llama_pooling_type", r.llama_pooling_type);
    resolve(found.handle, "llama_model_has_encoder", r.llama_model_has_encoder);
    r.table.size = sizeof r.table;
#define SIZE(name) r.table.sizeof_##name = 0;
    ADL_LLAMA_STRUCTS(SIZE)
#define POINTER(result, name, arguments) resolve(found.handle, #name, r.table.name);
    ADL_LLAMA_FUNCTIONS(POINTER)
    if (adl_llama_check(&r.table) != ADL_OK) {
        die("%s: %s", r.path.c_str(), adl_last_error());
    }
    check_model_params(reinterpret_cast<void *>(r.table.llama_model_default_params), r.path);
    translate(r);
    return r;
}

} // namespace

const Real & real() {
    static const Real found = make();
    return found;
}

} // namespace plugin
