// How failures travel: thrown inside the library, kept for adl_last_error at its border.

#pragma once

#include "adlocal.h"

#include <exception>
#include <new>
#include <string>
#include <utility>

namespace adl {

struct Error {
    int32_t     status;
    std::string message;
};

// printf into a string.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string format(const char * fmt, ...);

// Throws Error{ADL_ERROR_INPUT} unless one of our structures is as large in the host as here.
void check_own_size(const char * name, size_t hosts, size_t ours);

// Bytes of the first `most` of a UTF-8 text that are whole characters.
size_t cut(const char * text, size_t most) noexcept;

// Keeps an error for adl_last_error and returns its status. Never throws: a message that finds no memory is cut.
int32_t keep(const Error & error) noexcept;
int32_t keep(int32_t status, const char * message) noexcept;

// Calls `body`, and turns what it throws into a kept error and `failed`. No exception may cross a C border.
template <typename T, typename Body>
T guarded(T failed, Body && body) noexcept {
    try {
        return std::forward<Body>(body)();
    } catch (const Error & error) {
        keep(error);
    } catch (const std::bad_alloc &) {
        keep(ADL_ERROR_MEMORY, "out of memory; free some, or ask for a smaller n_ctx or n_batch");
    } catch (const std::exception & error) {
        keep(ADL_ERROR_PROXY, error.what());
    } catch (...) {
        keep(ADL_ERROR_PROXY, "llama.cpp threw an unknown exception");
    }
    return failed;
}

// The same for functions that return a status.
template <typename Body>
int32_t status_of(Body && body) noexcept {
    const int32_t result = guarded<int32_t>(INT32_MIN, std::forward<Body>(body));
    return result == INT32_MIN ? adl_last_status() : result;
}

} // namespace adl
