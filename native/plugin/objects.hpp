// Loaded objects, and llama.cpp in them.

#pragma once

#include <dlfcn.h>
#include <optional>
#include <string>

namespace plugin {

// Where a lookup through a loaded object finds llama.cpp: in itself, or in what it depends on. Not to be asked while objects are
// listed, when the linker's lock is held. `path` is "" for the program.
std::optional<Dl_info> llama_through(const std::string & path);

// Where this library begins.
void * own_base();

} // namespace plugin
