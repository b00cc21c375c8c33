#include "layout.hpp"

#include <cstring>

namespace plugin {

namespace {

constexpr size_t OURS  = sizeof(llama_context_params);
constexpr size_t FIRST = offsetof(llama_context_params, embeddings); // of the booleans

} // namespace

bool Layout::of_size(size_t size, Layout & out) {
    if (size != OURS && size != OURS + 8) {
        return false;
    }
    out.gap_ = size - OURS;
    return true;
}

llama_context_params Layout::to_ours(const HostContextParams & host) const {
    llama_context_params ours;
    auto *               bytes = reinterpret_cast<unsigned char *>(&ours);
    std::memcpy(bytes, host.bytes, FIRST);
    std::memcpy(bytes + FIRST, host.bytes + FIRST + gap_, OURS - FIRST);
    return ours;
}

void Layout::to_host(const llama_context_params & ours, HostContextParams & host) const {
    const auto * bytes = reinterpret_cast<const unsigned char *>(&ours);
    std::memcpy(host.bytes, bytes, FIRST);
    std::memcpy(host.bytes + FIRST + gap_, bytes + FIRST, OURS - FIRST);
}

} // namespace plugin
