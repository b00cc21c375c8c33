// dyld puts our functions in the place of llama.cpp's wherever another image refers to them, by a table of pairs. Within one
// image it does not, so a program that is one object with its llama.cpp is not protected; it is told so when it ends.

#include "fates.hpp"
#include "llama.h"
#include "system.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <iterator>
#include <mach-o/dyld.h>

namespace plugin {

namespace {

struct Pair {
    const void * ours;
    const void * theirs;
};

// The functions that guard.hpp has the others define, under names of their own.
#define ADL_DECLARE(name, fate)                                                                                                  \
    extern "C" void adl_ours_##name() __asm__("_adl_guarded_" #name);                                                             \
    extern "C" __attribute__((weak_import)) decltype(::name) name;
ADL_GUARDED(ADL_DECLARE)

#define ADL_PAIR(name, fate) {reinterpret_cast<const void *>(&adl_ours_##name), reinterpret_cast<const void *>(&::name)},

struct Named {
    const char * name;
    const void * ours;
};

#define ADL_NAMED(name, fate) {#name, reinterpret_cast<const void *>(&adl_ours_##name)},
const Named NAMED[] = {ADL_GUARDED(ADL_NAMED)};

} // namespace

const char * program_name() {
    return getprogname();
}

std::vector<std::string> loaded_objects() {
    std::vector<std::string> names;
    for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
        names.emplace_back(_dyld_get_image_name(i));
    }
    return names;
}

// What this image itself calls is not interposed.
void * find_symbol(void * handle, const char * name) {
    return dlsym(handle, name);
}

} // namespace plugin

// As in symbols.cpp: past the table of pairs, ctypes, JNA and P/Invoke look functions up by name.
extern "C" void * adl_guarded_dlsym(void * handle, const char * name) {
    const auto found = std::find_if(std::begin(plugin::NAMED), std::end(plugin::NAMED), [&](const plugin::Named & each) { return std::strcmp(each.name, name) == 0; });
    if (found != std::end(plugin::NAMED) && dlsym(handle, name) != nullptr) {
        return const_cast<void *>(found->ours);
    }
    return dlsym(handle, name);
}

namespace plugin {

__attribute__((used, section("__DATA,__interpose"))) const Pair PAIRS[] = {
    ADL_GUARDED(ADL_PAIR){reinterpret_cast<const void *>(&adl_guarded_dlsym), reinterpret_cast<const void *>(&dlsym)},
};

} // namespace plugin
