#include "error.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace adl {

namespace {

// A fixed buffer: saying that memory ran out must not need memory.
struct Kept {
    int32_t status       = ADL_OK;
    char    message[1024] = "";
};

thread_local Kept kept;

} // namespace

size_t cut(const char * text, size_t most) noexcept {
    size_t n = 0;
    while (n < most && text[n] != '\0') {
        ++n;
    }
    while (n == most && most > 0 && (static_cast<unsigned char>(text[most]) & 0xC0) == 0x80) {
        n = --most; // text[most] goes on with a character that began before
    }
    return n;
}

std::string format(const char * fmt, ...) {
    char    buffer[sizeof Kept::message + 4];
    va_list args;
    va_start(args, fmt);
    std::vsnprintf(buffer, sizeof buffer, fmt, args);
    va_end(args);
    return std::string(buffer, cut(buffer, sizeof Kept::message - 1));
}

void check_own_size(const char * name, size_t hosts, size_t ours) {
    if (hosts != ours) {
        throw Error{ADL_ERROR_INPUT, format("struct %s has %zu bytes in the host and %zu in adlocal %s; set its size, and compile with that "
                                            "version's adlocal.h", name, hosts, ours, ADL_VERSION)};
    }
}

int32_t keep(int32_t status, const char * message) noexcept {
    const size_t n = cut(message, sizeof kept.message - 1);
    kept.status    = status;
    std::memcpy(kept.message, message, n);
    kept.message[n] = '\0';
    return status;
}

int32_t keep(const Error & error) noexcept {
    return keep(error.status, error.message.c_str());
}

} // namespace adl

const char * adl_last_error(void) {
    return adl::kept.message;
}

int32_t adl_last_status(void) {
    return adl::kept.status;
}

const char * adl_version(void) {
    return ADL_VERSION;
}
