// What the guarded functions share. They stand before llama.cpp's own, and there is no protection in them: that is
// adl_lockstep's.

#pragma once

#include "process.hpp"
#include "real.hpp"

#define ADL_GUARD extern "C" __attribute__((visibility("default")))

#ifdef __APPLE__ // dyld is given pairs of functions, so ours need names of their own
#define ADL_RENAMED(name, fate) extern "C" decltype(::name) name __asm__("_adl_guarded_" #name);
ADL_GUARDED(ADL_RENAMED)
#undef ADL_RENAMED
#define ADL_LABEL(name) __asm__("_adl_guarded_" name)
#else
#define ADL_LABEL(name) __asm__(name)
#endif

namespace plugin {

// NULL where it is no context of a protected model's.
inline Context * find(const llama_context * context) {
    return Process::get().find(context);
}

inline Context * find(llama_memory_t memory) {
    return Process::get().find(memory);
}

} // namespace plugin
