// The host's llama.cpp, checked and copied.

#pragma once

#include "adlocal.h"

namespace adl {

// Throws Error{ADL_ERROR_LLAMA} unless the table is complete and of the llama.cpp that this library was compiled for.
void check(const adl_llama * llama);

} // namespace adl
