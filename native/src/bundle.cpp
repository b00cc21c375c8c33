// The same validation as adlocal/bundle.py: tests/test_native.py gives both the same vectors. What it leaves to llama.cpp,
// which refuses it when it loads the weights, is a file that ends before its last tensor does.

#include "bundle.hpp"

#include "error.hpp"
#include "llama_table.hpp"

#include <cmath>
#include <cstring>
#include <memory>

namespace adl {

namespace {

constexpr uint32_t FORMAT_VERSION = 1;

#define PREFIX "adlocal."

struct Key {
    const char * name;
    gguf_type    type;    // of the value, or of an array's elements
    bool         is_array;
};

constexpr Key FORMAT      = {PREFIX "format_version", GGUF_TYPE_UINT32, false};
constexpr Key ID          = {PREFIX "bundle_id", GGUF_TYPE_STRING, false};
constexpr Key EPSILON     = {PREFIX "epsilon", GGUF_TYPE_FLOAT64, false};
constexpr Key NORM        = {PREFIX "gradient.norm", GGUF_TYPE_FLOAT64, false};
constexpr Key DELTA_SCALE = {PREFIX "delta_scale", GGUF_TYPE_FLOAT64, false};
constexpr Key GUARD       = {PREFIX "guard", GGUF_TYPE_FLOAT64, false};
constexpr Key SIGN        = {PREFIX "sign", GGUF_TYPE_INT32, false};

// Every key that both halves hold alike; SIGN tells them apart.
constexpr Key KEYS[] = {
    FORMAT, ID, EPSILON, NORM, DELTA_SCALE, GUARD,
    {PREFIX "converter",          GGUF_TYPE_STRING,  false},
    {PREFIX "gradient.loss",      GGUF_TYPE_FLOAT64, false},
    {PREFIX "gradient.traces",    GGUF_TYPE_UINT32,  false},
    {PREFIX "gradient.tokens",    GGUF_TYPE_UINT32,  false},
    {PREFIX "params",             GGUF_TYPE_STRING,  false},
    {PREFIX "carriers.names",     GGUF_TYPE_STRING,  true},
    {PREFIX "carriers.fraction",  GGUF_TYPE_FLOAT64, false},
    {PREFIX "carriers.energy",    GGUF_TYPE_FLOAT64, false},
    {PREFIX "plus.sha256",        GGUF_TYPE_STRING,  false},
    {PREFIX "minus.sha256",       GGUF_TYPE_STRING,  false},
    {PREFIX "fidelity.median",    GGUF_TYPE_FLOAT64, false},
    {PREFIX "fidelity.p10",       GGUF_TYPE_FLOAT64, false},
    {PREFIX "fidelity.slope",     GGUF_TYPE_FLOAT64, false},
    {PREFIX "fidelity.positions", GGUF_TYPE_UINT32,  false},
    {PREFIX "fidelity.top_k",     GGUF_TYPE_UINT32,  false},
    {PREFIX "fidelity.forced",    GGUF_TYPE_BOOL,    false},
    {PREFIX "sweep.epsilon",      GGUF_TYPE_FLOAT64, true},
    {PREFIX "sweep.median",       GGUF_TYPE_FLOAT64, true},
    {PREFIX "sweep.p10",          GGUF_TYPE_FLOAT64, true},
    {PREFIX "sweep.slope",        GGUF_TYPE_FLOAT64, true},
    {PREFIX "base.sha256",        GGUF_TYPE_STRING,  false},
    {PREFIX "base.bytes",         GGUF_TYPE_UINT64,  false},
    {PREFIX "traces.sha256",      GGUF_TYPE_STRING,  false},
};

[[noreturn]] void refuse(std::string message) {
    throw Error{ADL_ERROR_BUNDLE, std::move(message)};
}

// An open GGUF header.
class Half {
  public:
    Half(const adl_llama & llama, std::string path) : llama_(llama), path_(std::move(path)), gguf_(nullptr, llama.gguf_free) {
        gguf_.reset(llama.gguf_init_from_file(path_.c_str(), {/* no_alloc = */ true, /* ctx = */ nullptr}));
        if (!gguf_) {
            refuse(format("bundle half unusable: %s is missing or no GGUF file; `adlocal convert PROXY.gguf --out DIR` makes a bundle",
                   path_.c_str()));
        }
    }

    const char * path() const { return path_.c_str(); }

    // Index of a key; refuses a missing one, or a value of another type.
    int64_t find(const Key & key) const {
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

    bool has(const Key & key) const { return llama_.gguf_find_key(gguf(), key.name) >= 0; }

    template <typename T>
    T value(const Key & key) const {
        T result;
        std::memcpy(&result, llama_.gguf_get_val_data(gguf(), find(key)), sizeof result);
        return result;
    }

    std::string text(const Key & key) const { return llama_.gguf_get_val_str(gguf(), find(key)); }

    const gguf_context * gguf() const { return gguf_.get(); }

  private:
    const adl_llama &                                 llama_;
    std::string                                       path_;
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf_;
};

size_t size_of(gguf_type type) {
    switch (type) {
        case GGUF_TYPE_BOOL:   return 1;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:  return 4;
        default:               return 8; // UINT64 and FLOAT64: KEYS has no others
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

bool same_array(const adl_llama & llama, const Key & key, const Half & a, int64_t i, const Half & b, int64_t j) {
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

bool same(const adl_llama & llama, const Key & key, const Half & a, const Half & b) {
    const int64_t i = a.find(key), j = b.find(key);
    if (key.is_array) {
        return same_array(llama, key, a, i, b, j);
    }
    if (key.type == GGUF_TYPE_STRING) {
        return a.text(key) == b.text(key);
    }
    return same_numbers(key.type, llama.gguf_get_val_data(a.gguf(), i), llama.gguf_get_val_data(b.gguf(), j), 1);
}

void check_version(const Half & half) {
    if (!half.has(FORMAT)) {
        refuse(format("%s: a GGUF file, but no half of a bundle; make one with `adlocal convert`", half.path()));
    }
    const auto version = half.value<uint32_t>(FORMAT);
    if (version != FORMAT_VERSION) {
        refuse(format("%s: bundle format %u; this adlocal reads %u: %s", half.path(), version, FORMAT_VERSION,
               version > FORMAT_VERSION ? "upgrade adlocal" : "convert again"));
    }
}

void check_signs(const char * dir, const Half & plus, const Half & minus) {
    const auto p = plus.value<int32_t>(SIGN), m = minus.value<int32_t>(SIGN);
    if (p == -1 && m == 1) {
        refuse(format("%s: the halves are swapped; exchange the names proxy-plus.gguf and proxy-minus.gguf", dir));
    }
    if (p != 1 || m != -1) {
        refuse(format("%s: the halves' signs are (%d, %d), expected (1, -1); convert again", dir, p, m));
    }
}

void check_keys(const adl_llama & llama, const char * dir, const Half & plus, const Half & minus) {
    for (const Key & key : KEYS) {
        plus.find(key);
        minus.find(key);
    }
    if (plus.text(ID) != minus.text(ID)) {
        refuse(format("%s: the halves are of two bundles, %.12s and %.12s; take both from one conversion", dir, plus.text(ID).c_str(),
               minus.text(ID).c_str()));
    }
    for (const Key & key : KEYS) {
        if (!same(llama, key, plus, minus)) {
            refuse(format("%s: the halves disagree on %s; convert again", dir, key.name));
        }
    }
}

void check_tensors(const adl_llama & llama, const char * dir, const Half & plus, const Half & minus) {
    const int64_t n    = llama.gguf_get_n_tensors(plus.gguf());
    bool          same = n == llama.gguf_get_n_tensors(minus.gguf());
    for (int64_t i = 0; same && i < n; ++i) {
        same = std::strcmp(llama.gguf_get_tensor_name(plus.gguf(), i), llama.gguf_get_tensor_name(minus.gguf(), i)) == 0 &&
               llama.gguf_get_tensor_type(plus.gguf(), i) == llama.gguf_get_tensor_type(minus.gguf(), i);
    }
    if (!same) {
        refuse(format("%s: the halves hold different tensors; convert again", dir));
    }
}

double positive(const char * dir, const Half & half, const Key & key) {
    const auto value = half.value<double>(key);
    if (!(std::isfinite(value) && value > 0)) {
        refuse(format("%s: %s is %g, expected a positive number; convert again", dir, key.name, value));
    }
    return value;
}

double share(const char * dir, const Half & half, const Key & key) {
    const auto value = half.value<double>(key);
    if (!(value >= 0 && value <= 1)) {
        refuse(format("%s: %s is %g, expected 0 to 1; convert again", dir, key.name, value));
    }
    return value;
}

void copy_id(const char * dir, const std::string & id, char (&out)[65]) {
    if (id.empty() || id.size() >= sizeof out) {
        refuse(format("%s: %s has %zu characters, expected 1 to %zu; convert again", dir, ID.name, id.size(), sizeof out - 1));
    }
    std::memcpy(out, id.c_str(), id.size() + 1);
}

} // namespace

std::string plus_path(const char * dir) {
    return std::string(dir) + "/proxy-plus.gguf";
}

std::string minus_path(const char * dir) {
    return std::string(dir) + "/proxy-minus.gguf";
}

adl_bundle read_bundle(const adl_llama & llama, const char * dir) {
    if (dir == nullptr) {
        refuse("no bundle directory was given; `adlocal convert PROXY.gguf --out DIR` makes one");
    }
    const Half plus(llama, plus_path(dir)), minus(llama, minus_path(dir));
    check_version(plus);
    check_version(minus);
    check_signs(dir, plus, minus);
    check_keys(llama, dir, plus, minus);
    check_tensors(llama, dir, plus, minus);

    adl_bundle bundle     = {};
    bundle.format_version = FORMAT_VERSION;
    copy_id(dir, plus.text(ID), bundle.id);
    bundle.epsilon       = positive(dir, plus, EPSILON);
    bundle.delta_scale   = positive(dir, plus, DELTA_SCALE);
    bundle.gradient_norm = positive(dir, plus, NORM);
    bundle.guard         = share(dir, plus, GUARD);
    return bundle;
}

} // namespace adl

int32_t adl_bundle_read(const struct adl_llama * llama, const char * dir, struct adl_bundle * out) {
    return adl::status_of([&] {
        adl::check(llama);
        if (out == nullptr) {
            throw adl::Error{ADL_ERROR_INPUT, "adl_bundle_read: out is NULL"};
        }
        *out = adl::read_bundle(*llama, dir);
        return static_cast<int32_t>(ADL_OK);
    });
}
