#include "objects.hpp"

#include "system.hpp"

namespace plugin {

std::optional<Dl_info> llama_through(const std::string & path) {
    void * const handle = dlopen(path.empty() ? nullptr : path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) {
        return std::nullopt;
    }
    void * const init = find_symbol(handle, "llama_init_from_model");
    Dl_info      where;
    const bool   found = init != nullptr && dladdr(init, &where) != 0;
    dlclose(handle);
    return found ? std::optional(where) : std::nullopt;
}

void * own_base() {
    Dl_info where;
    return dladdr(reinterpret_cast<const void *>(&own_base), &where) != 0 ? where.dli_fbase : nullptr;
}

} // namespace plugin
