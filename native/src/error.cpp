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

std::string format(const char * fmt, ...) {
    char    buffer[1024];
    va_list args;
    va_start(args, fmt);
    std::vsnprintf(buffer, sizeof buffer, fmt, args);
    va_end(args);
    return buffer;
}

int32_t keep(int32_t status, const char * message) noexcept {
    kept.status = status;
    std::strncpy(kept.message, message, sizeof kept.message - 1);
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
