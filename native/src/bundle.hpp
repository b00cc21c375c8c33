#pragma once

#include "adlocal.h"

#include <string>

namespace adl {

// The two files of a bundle: plus and minus half, or base and adapter.
std::string first_path(const char * dir, bool is_adapter);
std::string second_path(const char * dir, bool is_adapter);

// Reads and validates both files. Throws Error{ADL_ERROR_BUNDLE}.
adl_bundle read_bundle(const adl_llama & llama, const char * dir);

} // namespace adl
