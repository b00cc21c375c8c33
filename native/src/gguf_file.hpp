// Metadata keys and tensor table of a GGUF file, read through the host's gguf functions.

#pragma once

#include "adlocal.h"

#include "error.hpp"

#include <cstring>
#include <memory>
#include <string>

namespace adl {

// A metadata key and what has to be stored under it.
struct Key {
    const char * name;
    gguf_type    type;    // of the value, or of an array's elements
    bool         is_array;
};

[[noreturn]] void refuse(std::string message); // throws Error{ADL_ERROR_BUNDLE}

// An open GGUF header.
class File {
  public:
    File(const adl_llama & llama, std::string path);

    const char * path() const { return path_.c_str(); }

    // Index of a key; refuses a missing one, or a value of another type.
    int64_t find(const Key & key) const;

    bool has(const Key & key) const { return llama_.gguf_find_key(gguf(), key.name) >= 0; }

    template <typename T>
    T value(const Key & key) const {
        T result;
        std::memcpy(&result, llama_.gguf_get_val_data(gguf(), find(key)), sizeof result);
        return result;
    }

    std::string text(const Key & key) const { return llama_.gguf_get_val_str(gguf(), find(key)); }

    // Number of an array's elements.
    size_t count(const Key & key) const { return llama_.gguf_get_arr_n(gguf(), find(key)); }

    const gguf_context * gguf() const { return gguf_.get(); }

  private:
    const adl_llama &                                 llama_;
    std::string                                       path_;
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf_;
};

// Do both files hold the same value under a key?
bool same(const adl_llama & llama, const Key & key, const File & a, const File & b);

} // namespace adl
