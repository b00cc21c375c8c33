#include "llama_table.hpp"

#include "error.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace adl {

namespace {

#define NAME_OF_STRUCT(name) #name,
#define NAME_OF_FUNCTION(result, name, arguments) #name,
constexpr const char * STRUCTS[]   = {ADL_LLAMA_STRUCTS(NAME_OF_STRUCT) nullptr};
constexpr const char * FUNCTIONS[] = {ADL_LLAMA_FUNCTIONS(NAME_OF_FUNCTION) nullptr};

constexpr size_t N_STRUCTS   = sizeof STRUCTS / sizeof *STRUCTS - 1;
constexpr size_t N_FUNCTIONS = sizeof FUNCTIONS / sizeof *FUNCTIONS - 1;

void check_size(const char * name, size_t host, size_t ours) {
    if (host != 0 && host != ours) {
        throw Error{ADL_ERROR_LLAMA,
                    format("struct %s has %zu bytes in the host's llama.cpp and %zu in the one that adlocal was compiled for (%s); "
                           "compile adlocal against the host's llama.h",
                           name, host, ours, ADL_LLAMA_VERSION)};
    }
}

// Versions whose llama.h agrees in all that is used here: a library for one of them serves the others.
constexpr const char * ALIKE[] = {"0.5.0-dev", "0.6.0-dev"};

bool is_alike(const char * version) {
    return std::any_of(std::begin(ALIKE), std::end(ALIKE), [&](const char * each) { return std::strcmp(each, version) == 0; });
}

bool fits(const char * version) {
    return version != nullptr && (std::strcmp(version, ADL_LLAMA_VERSION) == 0 || (is_alike(version) && is_alike(ADL_LLAMA_VERSION)));
}

void check_pointer(const char * name, bool missing) {
    if (missing) {
        throw Error{ADL_ERROR_LLAMA, format("the host's llama.cpp lacks the function %s; use llama.cpp %s", name, ADL_LLAMA_VERSION)};
    }
}

} // namespace

void check(const adl_llama * llama) {
    if (llama == nullptr) {
        throw Error{ADL_ERROR_LLAMA, "no table of llama.cpp's functions was given; fill a struct adl_llama"};
    }
    if (llama->size != sizeof(adl_llama)) {
        throw Error{ADL_ERROR_LLAMA, format("struct adl_llama has %zu bytes in the host and %zu in adlocal %s; compile both with one adlocal.h",
                                            llama->size, sizeof(adl_llama), ADL_VERSION)};
    }
#define CHECK_SIZE(name) check_size(#name, llama->sizeof_##name, sizeof(struct name));
    ADL_LLAMA_STRUCTS(CHECK_SIZE)
#define CHECK_POINTER(result, name, arguments) check_pointer(#name, llama->name == nullptr);
    ADL_LLAMA_FUNCTIONS(CHECK_POINTER)
    const char * version = llama->llama_version();
    if (!fits(version)) {
        throw Error{ADL_ERROR_LLAMA,
                    format("the host's llama.cpp is %s, and adlocal was compiled for %s; compile adlocal against the host's llama.h",
                           version ? version : "of no version", ADL_LLAMA_VERSION)};
    }
}

} // namespace adl

const char * adl_llama_struct_name(size_t i) {
    return i < adl::N_STRUCTS ? adl::STRUCTS[i] : nullptr;
}

const char * adl_llama_function_name(size_t i) {
    return i < adl::N_FUNCTIONS ? adl::FUNCTIONS[i] : nullptr;
}

int32_t adl_llama_check(const struct adl_llama * llama) {
    return adl::status_of([&] {
        adl::check(llama);
        return static_cast<int32_t>(ADL_OK);
    });
}
