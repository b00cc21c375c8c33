#include "states.hpp"

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <unistd.h>

namespace plugin {

namespace {

constexpr uint64_t MAGIC = 0x3165746174736c64; // "dlstate1"

// The end of a trailer, and so of a state.
struct Footer {
    uint64_t check;  // of what is before it
    uint64_t length; // of the trailer, this included
    uint64_t magic;
};

uint64_t check_of(const uint8_t * bytes, size_t n) { // FNV-1a: against damage, not malice; a state is as secret as the bundle
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; ++i) {
        hash = (hash ^ bytes[i]) * 0x100000001b3;
    }
    return hash;
}

void put(std::vector<uint8_t> & out, const void * data, size_t n) {
    const auto * bytes = static_cast<const uint8_t *>(data);
    out.insert(out.end(), bytes, bytes + n);
}

bool take(const uint8_t *& from, const uint8_t * end, void * out, size_t n) {
    if (static_cast<size_t>(end - from) < n) {
        return false;
    }
    std::memcpy(out, from, n);
    from += n;
    return true;
}

} // namespace

std::vector<uint8_t> trailer(const Context & context, llama_seq_id first, llama_seq_id last) {
    std::vector<uint8_t> out;
    for (llama_seq_id seq_id = first; seq_id <= last; ++seq_id) {
        const uint64_t           n = adl_lockstep_get_tokens(context.lockstep(), seq_id, nullptr, nullptr, 0);
        std::vector<llama_token> tokens(n);
        std::vector<llama_pos>   pos(n);
        adl_lockstep_get_tokens(context.lockstep(), seq_id, tokens.data(), pos.data(), n);
        put(out, &n, sizeof n);
        put(out, tokens.data(), n * sizeof(llama_token));
        put(out, pos.data(), n * sizeof(llama_pos));
    }
    const Footer footer = {check_of(out.data(), out.size()), out.size() + sizeof(Footer), MAGIC};
    put(out, &footer, sizeof footer);
    return out;
}

size_t own_size(const uint8_t * state, size_t size) {
    Footer footer;
    if (state == nullptr || size < sizeof footer) {
        return 0;
    }
    std::memcpy(&footer, state + size - sizeof footer, sizeof footer);
    if (footer.magic != MAGIC || footer.length > size || footer.length < sizeof footer) {
        return 0;
    }
    const uint8_t * body = state + size - footer.length;
    return check_of(body, footer.length - sizeof footer) == footer.check ? size - footer.length : 0;
}

bool apply(Context & context, const uint8_t * state, size_t size, llama_seq_id target) {
    const uint8_t *    from = state + own_size(state, size);
    const uint8_t *    end  = state + size - sizeof(Footer);
    const llama_seq_id last = target >= 0 ? target : static_cast<llama_seq_id>(context.n_seq_max) - 1;
    for (llama_seq_id seq_id = target >= 0 ? target : 0; seq_id <= last; ++seq_id) {
        uint64_t n = 0;
        if (!take(from, end, &n, sizeof n) || n > static_cast<uint64_t>(end - from)) {
            return false;
        }
        std::vector<llama_token> tokens(n);
        std::vector<llama_pos>   pos(n);
        if (!take(from, end, tokens.data(), n * sizeof(llama_token)) || !take(from, end, pos.data(), n * sizeof(llama_pos))) {
            return false;
        }
        const bool takes_back = context.takes_back(seq_id, tokens, pos);
        if (adl_lockstep_restore(context.lockstep(), seq_id, tokens.data(), pos.data(), n, 0) != ADL_OK) {
            return false;
        }
        context.restored(seq_id, takes_back);
    }
    return true;
}

bool append_trailer(const char * path, const std::vector<uint8_t> & bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::app);
    file.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    file.close();
    return !file.fail();
}

StrippedFile::StrippedFile(const char * path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    const size_t own = own_size(bytes_.data(), bytes_.size());
    if (own == 0) {
        return;
    }
    std::string name = std::string(path) + "." + std::string(6, 'X');
    const int   fd   = mkstemp(name.data()); // in place of the letters; beside it, as private as the file itself
    if (fd < 0) {
        return;
    }
    const bool written = write(fd, bytes_.data(), own) == static_cast<ssize_t>(own);
    close(fd);
    path_ = name;
    if (!written) {
        unlink(name.c_str());
        path_.clear();
    }
}

StrippedFile::~StrippedFile() {
    if (!path_.empty()) {
        unlink(path_.c_str());
    }
}

} // namespace plugin
