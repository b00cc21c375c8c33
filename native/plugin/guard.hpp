// What the guarded functions share. They stand before llama.cpp's own, and there is no protection in them: that is
// adl_lockstep's.

#pragma once

#include "process.hpp"
#include "real.hpp"

#define ADL_GUARD extern "C" __attribute__((visibility("default")))

namespace plugin {

// NULL where it is no context of a protected model's.
inline Context * find(const llama_context * context) {
    return Process::get().find(context);
}

inline Context * find(llama_memory_t memory) {
    return Process::get().find(memory);
}

} // namespace plugin
