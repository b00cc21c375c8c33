#include "gguf_file.hpp"

namespace adl {

void refuse(std::string message) {
    throw Error{ADL_ERROR_BUNDLE, std::move(message)};
}

File::File(const adl_llama & llama, std::string path) : llama_(llama), path_(std::move(path)), gguf_(nullptr, llama.gguf_free) {
    gguf_.reset(llama.gguf_init_from_file(path_.c_str(), {/* no_alloc = */ true, /* ctx = */ nullptr}));
    if (!gguf_) {
        refuse(format("bundle file unusable: %s is missing or no GGUF file; `adlocal convert PROXY.gguf --out DIR` makes a bundle",
               path_.c_str()));
    }
}

int64_t File::find(const Key & key) const {
    const int64_t i = llama_.gguf_find_key(gguf(), key.name);
    if (i < 0) {
        refuse(format("%s: key %s is missing; convert again", path(), key.name));
    }
    const gguf_type type = llama_.gguf_get_kv_type(gguf(), i);
    if (key.is_array ? type != GGUF_TYPE_ARRAY || llama_.gguf_get_arr_type(gguf(), i) != key.type : type != key.type) {
        refuse(format("%s: key %s is of GGUF type %d, expected %s%d; convert again", path(), key.name, type, key.is_array ? "an array of " : "",
               key.type));
    }
    return i;
}

namespace {

size_t size_of(gguf_type type) {
    switch (type) {
        case GGUF_TYPE_BOOL:   return 1;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:  return 4;
        default:               return 8; // UINT64 and FLOAT64: a bundle has no others
    }
}

// Numbers by value, as anyone would compare them: NaN is like nothing, −0 is 0.
bool same_numbers(gguf_type type, const void * a, const void * b, size_t n) {
    if (type != GGUF_TYPE_FLOAT64) {
        return n == 0 || std::memcmp(a, b, n * size_of(type)) == 0;
    }
    for (size_t i = 0; i < n; ++i) {
        double x, y; // GGUF does not align values
        std::memcpy(&x, static_cast<const char *>(a) + i * sizeof x, sizeof x);
        std::memcpy(&y, static_cast<const char *>(b) + i * sizeof y, sizeof y);
        if (!(x == y)) {
            return false;
        }
    }
    return true;
}

bool same_array(const adl_llama & llama, const Key & key, const File & a, int64_t i, const File & b, int64_t j) {
    const size_t n = llama.gguf_get_arr_n(a.gguf(), i);
    if (n != llama.gguf_get_arr_n(b.gguf(), j)) {
        return false;
    }
    if (key.type != GGUF_TYPE_STRING) {
        return same_numbers(key.type, llama.gguf_get_arr_data(a.gguf(), i), llama.gguf_get_arr_data(b.gguf(), j), n);
    }
    for (size_t k = 0; k < n; ++k) {
        if (std::strcmp(llama.gguf_get_arr_str(a.gguf(), i, k), llama.gguf_get_arr_str(b.gguf(), j, k)) != 0) {
            return false;
        }
    }
    return true;
}

} // namespace

bool same(const adl_llama & llama, const Key & key, const File & a, const File & b) {
    const int64_t i = a.find(key), j = b.find(key);
    if (key.is_array) {
        return same_array(llama, key, a, i, b, j);
    }
    if (key.type == GGUF_TYPE_STRING) {
        return a.text(key) == b.text(key);
    }
    return same_numbers(key.type, llama.gguf_get_val_data(a.gguf(), i), llama.gguf_get_val_data(b.gguf(), j), 1);
}

} // namespace adl
