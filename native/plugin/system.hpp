// What differs between the systems on which a library can be preloaded: Linux with glibc, and macOS (compiled, never run).

#pragma once

#include <string>
#include <vector>

namespace plugin {

// The short name of the program, for people.
const char * program_name();

// Paths of the objects that are loaded; "" for the program itself where the system does not name it.
std::vector<std::string> loaded_objects();

// dlsym of the C library: the plugin stands before that name itself.
void * find_symbol(void * handle, const char * name);

} // namespace plugin
