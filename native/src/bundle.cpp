// The same validation as adlocal/bundle.py: tests/test_native.py gives both the same vectors. What it leaves to llama.cpp,
// which refuses it when it loads the weights, is a file that ends before its last tensor does.

#include "bundle.hpp"

#include "error.hpp"
#include "gguf_file.hpp"
#include "llama_table.hpp"

#include <cmath>
#include <cstring>
#include <filesystem>

namespace adl {

namespace {

constexpr uint32_t FORMAT_VERSION = 2;

#define PREFIX "adlocal."

// What the two files of a format are: their names, the signs they store, what messages call both, what the key says.
struct Format {
    const char * first;
    const char * second;
    int32_t      sign_first;
    int32_t      sign_second;
    const char * both;
    const char * name;
};

constexpr Format HALVES  = {"proxy-plus.gguf", "proxy-minus.gguf", 1, -1, "the halves", "halves"};
constexpr Format ADAPTER = {"proxy-base.gguf", "proxy-adapter.gguf", 0, 1, "base and adapter", "adapter"};

constexpr Key VERSION     = {PREFIX "format_version", GGUF_TYPE_UINT32, false};
constexpr Key FORMAT      = {PREFIX "format", GGUF_TYPE_STRING, false};
constexpr Key ID          = {PREFIX "bundle_id", GGUF_TYPE_STRING, false};
constexpr Key EPSILON     = {PREFIX "epsilon", GGUF_TYPE_FLOAT64, false};
constexpr Key NORM        = {PREFIX "gradient.norm", GGUF_TYPE_FLOAT64, false};
constexpr Key DELTA_SCALE = {PREFIX "delta_scale", GGUF_TYPE_FLOAT64, false};
constexpr Key GUARD       = {PREFIX "guard", GGUF_TYPE_FLOAT64, false};
constexpr Key SIGN        = {PREFIX "sign", GGUF_TYPE_INT32, false};

// Anything but 0, and llama.cpp scales the adapter by more than ε.
constexpr Key ALPHA = {"adapter.lora.alpha", GGUF_TYPE_FLOAT32, false};

constexpr Key CAPABILITIES = {PREFIX "capabilities.names", GGUF_TYPE_STRING, true};
constexpr Key COSINES      = {PREFIX "capabilities.cosines", GGUF_TYPE_FLOAT64, true}; // between any two capabilities
constexpr Key HASHES       = {PREFIX "carriers.sha256", GGUF_TYPE_STRING, true};

// One element a capability.
constexpr Key OF_CAPABILITIES[] = {
    {PREFIX "capabilities.weights", GGUF_TYPE_FLOAT64, true},
    {PREFIX "capabilities.norms",   GGUF_TYPE_FLOAT64, true},
    {PREFIX "capabilities.losses",  GGUF_TYPE_FLOAT64, true},
    {PREFIX "capabilities.traces",  GGUF_TYPE_UINT32,  true},
    {PREFIX "capabilities.sha256",  GGUF_TYPE_STRING,  true},
};

// Every key that both files hold alike; SIGN tells them apart.
constexpr Key KEYS[] = {
    VERSION, FORMAT, ID, EPSILON, NORM, DELTA_SCALE, GUARD, CAPABILITIES, COSINES, HASHES,
    OF_CAPABILITIES[0], OF_CAPABILITIES[1], OF_CAPABILITIES[2], OF_CAPABILITIES[3], OF_CAPABILITIES[4],
    {PREFIX "converter",          GGUF_TYPE_STRING,  false},
    {PREFIX "gradient.loss",      GGUF_TYPE_FLOAT64, false},
    {PREFIX "gradient.traces",    GGUF_TYPE_UINT32,  false},
    {PREFIX "gradient.tokens",    GGUF_TYPE_UINT32,  false},
    {PREFIX "params",             GGUF_TYPE_STRING,  false},
    {PREFIX "params.excluded",    GGUF_TYPE_STRING,  true},
    {PREFIX "quality",            GGUF_TYPE_STRING,  false},
    {PREFIX "adapter.rank",       GGUF_TYPE_UINT32,  false},
    {PREFIX "carriers.names",     GGUF_TYPE_STRING,  true},
    {PREFIX "carriers.fraction",  GGUF_TYPE_FLOAT64, false},
    {PREFIX "carriers.energy",    GGUF_TYPE_FLOAT64, false},
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
};

// The format whose files lie in the directory; halves are missed where there are none of either.
const Format & format_of(const char * dir) {
    const auto path  = std::filesystem::u8path(dir);
    const auto found = [&](const Format & format) -> const char * {
        std::error_code ignored;
        return std::filesystem::exists(path / format.first, ignored)    ? format.first
               : std::filesystem::exists(path / format.second, ignored) ? format.second
                                                                        : nullptr;
    };
    const char * half = found(HALVES), * part = found(ADAPTER);
    if (half != nullptr && part != nullptr) {
        refuse(format("%s: %s and %s are of two formats; remove one of the bundles", dir, half, part));
    }
    return part != nullptr ? ADAPTER : HALVES;
}

void check_version(const File & file) {
    if (!file.has(VERSION)) {
        refuse(format("%s: a GGUF file, but no part of a bundle; make one with `adlocal convert`", file.path()));
    }
    const auto version = file.value<uint32_t>(VERSION);
    if (version != FORMAT_VERSION) {
        refuse(format("%s: bundle format %u; this adlocal reads %u: %s", file.path(), version, FORMAT_VERSION,
               version > FORMAT_VERSION ? "upgrade adlocal" : "convert again"));
    }
}

void check_signs(const char * dir, const Format & kind, const File & first, const File & second) {
    const auto a = first.value<int32_t>(SIGN), b = second.value<int32_t>(SIGN);
    if (a == kind.sign_second && b == kind.sign_first) {
        refuse(format("%s: %s are swapped; exchange the names %s and %s", dir, kind.both, kind.first, kind.second));
    }
    if (a != kind.sign_first || b != kind.sign_second) {
        refuse(format("%s: the signs of %s are (%d, %d), expected (%d, %d); convert again", dir, kind.both, a, b, kind.sign_first,
               kind.sign_second));
    }
}

void check_keys(const adl_llama & llama, const char * dir, const Format & kind, const File & first, const File & second) {
    for (const Key & key : KEYS) {
        first.find(key);
        second.find(key);
    }
    if (first.text(ID) != second.text(ID)) {
        refuse(format("%s: %s is of bundle %.12s and %s of %.12s; take both from one conversion", dir, kind.first, first.text(ID).c_str(),
               kind.second, second.text(ID).c_str()));
    }
    for (const Key & key : KEYS) {
        if (!same(llama, key, first, second)) {
            refuse(format("%s: %s disagree on %s; convert again", dir, kind.both, key.name));
        }
    }
    if (first.text(FORMAT) != kind.name) {
        refuse(format("%s: %s and %s say format '%s', expected '%s'; convert again", dir, kind.first, kind.second, first.text(FORMAT).c_str(),
               kind.name));
    }
}

void check_count(const char * dir, const File & file, const Key & key, size_t expected) {
    if (file.count(key) != expected) {
        refuse(format("%s: %s has %zu entries, expected %zu; convert again", dir, key.name, file.count(key), expected));
    }
}

void check_counts(const char * dir, const File & file, const Format & kind) {
    const size_t n = file.count(CAPABILITIES);
    for (const Key & key : OF_CAPABILITIES) {
        check_count(dir, file, key, n);
    }
    check_count(dir, file, COSINES, n * n);
    check_count(dir, file, HASHES, &kind == &HALVES ? 2 : 1);
}

void check_alpha(const File & adapter) {
    const auto alpha = adapter.value<float>(ALPHA);
    if (alpha != 0) {
        refuse(format("%s: %s is %g, expected 0; convert again", adapter.path(), ALPHA.name, alpha));
    }
}

void check_tensors(const adl_llama & llama, const char * dir, const File & plus, const File & minus) {
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

double positive(const char * dir, const File & file, const Key & key) {
    const auto value = file.value<double>(key);
    if (!(std::isfinite(value) && value > 0)) {
        refuse(format("%s: %s is %g, expected a positive number; convert again", dir, key.name, value));
    }
    return value;
}

double share(const char * dir, const File & file, const Key & key) {
    const auto value = file.value<double>(key);
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

std::string first_path(const char * dir, bool is_adapter) {
    return std::string(dir) + "/" + (is_adapter ? ADAPTER : HALVES).first;
}

std::string second_path(const char * dir, bool is_adapter) {
    return std::string(dir) + "/" + (is_adapter ? ADAPTER : HALVES).second;
}

adl_bundle read_bundle(const adl_llama & llama, const char * dir) {
    if (dir == nullptr) {
        refuse("no bundle directory was given; `adlocal convert PROXY.gguf --out DIR` makes one");
    }
    const Format & kind       = format_of(dir);
    const bool     is_adapter = &kind == &ADAPTER;
    const File     first(llama, first_path(dir, is_adapter)), second(llama, second_path(dir, is_adapter));
    check_version(first);
    check_version(second);
    check_signs(dir, kind, first, second);
    check_keys(llama, dir, kind, first, second);
    check_counts(dir, first, kind);
    if (is_adapter) {
        check_alpha(second);
    } else {
        check_tensors(llama, dir, first, second);
    }

    adl_bundle bundle     = {};
    bundle.size           = sizeof bundle;
    bundle.format_version = FORMAT_VERSION;
    bundle.is_adapter     = is_adapter;
    copy_id(dir, first.text(ID), bundle.id);
    bundle.epsilon       = positive(dir, first, EPSILON);
    bundle.delta_scale   = positive(dir, first, DELTA_SCALE);
    bundle.gradient_norm = positive(dir, first, NORM);
    bundle.guard         = share(dir, first, GUARD);
    return bundle;
}

} // namespace adl

int32_t adl_bundle_read(const struct adl_llama * llama, const char * dir, struct adl_bundle * out) {
    return adl::status_of([&] {
        adl::check(llama);
        if (out == nullptr) {
            throw adl::Error{ADL_ERROR_INPUT, "adl_bundle_read: out is NULL"};
        }
        adl::check_own_size("adl_bundle", out->size, sizeof *out);
        *out = adl::read_bundle(*llama, dir);
        return static_cast<int32_t>(ADL_OK);
    });
}
