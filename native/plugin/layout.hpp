// llama_context_params as the program's llama.cpp lays it out, which may not be as this library was compiled.
//
// Builds of one version differ: 0.6.0-dev has gained a field of eight bytes between abort_callback_data and the booleans.
// The structure travels by value, so it is taken and passed on as bytes, and read through a copy in our own layout.

#pragma once

#include "llama.h"

#include <cstddef>

namespace plugin {

// As much as the largest layout that is known. Bytes beyond the host's own are neither read nor written by it.
struct HostContextParams {
    alignas(8) unsigned char bytes[168];
};

using HostInit     = llama_context * (*)(llama_model * model, HostContextParams params);
using HostDefaults = HostContextParams (*)();

class Layout {
  public:
    // The layout of a structure of this size; false where it is none that is known.
    static bool of_size(size_t size, Layout & out);

    llama_context_params to_ours(const HostContextParams & host) const;

    // Changes in `host` what is there of ours, and leaves what is not.
    void to_host(const llama_context_params & ours, HostContextParams & host) const;

  private:
    size_t gap_ = 0; // bytes that the host has before the booleans, and we have not
};

} // namespace plugin
