#pragma once

#include "adlocal.h"

#include <vector>

namespace adl {

// Number of leading token ids that both share. Throws Error{ADL_ERROR_VOCABULARY}.
int32_t shared_vocabulary(const adl_llama & llama, const llama_model * teacher, const llama_model * proxy);

// The tokens at which generation ends.
std::vector<llama_token> end_tokens(const adl_llama & llama, const llama_vocab * vocab);

} // namespace adl
