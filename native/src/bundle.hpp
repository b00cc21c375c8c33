#pragma once

#include "adlocal.h"

#include <string>

namespace adl {

std::string plus_path(const char * dir);
std::string minus_path(const char * dir);

// Reads and validates both halves. Throws Error{ADL_ERROR_BUNDLE}.
adl_bundle read_bundle(const adl_llama & llama, const char * dir);

} // namespace adl
