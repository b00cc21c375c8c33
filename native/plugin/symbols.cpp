// dlsym, past which ctypes, JNA and P/Invoke reach llama.cpp: a handle's search does not look at preloaded libraries.

#include "coverage.hpp"
#include "fates.hpp"
#include "system.hpp"

#include <algorithm>
#include <cstring>
#include <dlfcn.h>
#include <iterator>

namespace plugin {

namespace {

#define ADL_NAME(name, fate) #name,
constexpr const char * GUARDED[] = {ADL_GUARDED(ADL_NAME)};

using Dlsym = void * (*)(void *, const char *);

// By its version, because its plain name is ours.
Dlsym c_librarys() {
    static const Dlsym found = [] {
        void * address = nullptr;
        for (const char * version : {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"}) {
            address = address ? address : dlvsym(RTLD_NEXT, "dlsym", version);
        }
        return reinterpret_cast<Dlsym>(address);
    }();
    return found;
}

bool is_guarded(const char * name) {
    return std::strncmp(name, "llama_", 6) == 0 &&
           std::any_of(std::begin(GUARDED), std::end(GUARDED), [&](const char * each) { return std::strcmp(each, name) == 0; });
}

} // namespace

void * find_symbol(void * handle, const char * name) {
    return c_librarys()(handle, name);
}

} // namespace plugin

// RTLD_NEXT and RTLD_DEFAULT search from the caller on: the call has to reach the C library as the caller's own, which a jump
// at the end does. So nothing may be left to do after it.
extern "C" __attribute__((visibility("default"), noinline)) void * dlsym(void * handle, const char * name) {
    const plugin::Dlsym next = plugin::c_librarys();
    plugin::look_at_objects(); // what a program opened, it looks up in next
    if (handle != RTLD_NEXT && handle != RTLD_DEFAULT && plugin::is_guarded(name) && next(handle, name) != nullptr) {
        return next(RTLD_DEFAULT, name); // ours: preloaded libraries come first
    }
    return next(handle, name);
}
