// A bundle's metadata: the good one, and every way to be bad.

#include "check.hpp"
#include "models.hpp"

#include <cmath>
#include <limits>

namespace {

using namespace fake;
using models::DIR;
using models::MINUS;
using models::PLUS;

// Checks that reading fails in these words and writes nothing.
void check_refused(const std::string & words, const char * dir = DIR) {
    const adl_llama llama = fake_llama_table();
    adl_bundle      before, out;
    std::memset(&before, 0x5a, sizeof before);
    std::memset(&out, 0x5a, sizeof out);
    before.size = out.size = sizeof out;
    CHECK_EQ(adl_bundle_read(&llama, dir, &out), ADL_ERROR_BUNDLE);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK_EQ(adl_last_status(), ADL_ERROR_BUNDLE);
    CHECK(std::memcmp(&before, &out, sizeof out) == 0);
    CHECK_EQ(counts().ggufs, 0);
}

// Sets a key in both halves.
void set_both(const std::string & key, const Value & value) {
    file(PLUS).keys[key] = file(MINUS).keys[key] = value;
}

// Another value of the same type.
Value changed(Value value) {
    if (!value.strings.empty()) {
        value.strings.back() += "x";
    } else {
        value.bytes.back() ^= 1;
    }
    return value;
}

// The same content under another type.
Value of_other_type(const Value & value) {
    return value.type == GGUF_TYPE_STRING ? u32(1) : text("1");
}

TEST(a_good_bundle_is_read) {
    models::install();
    const adl_llama llama  = fake_llama_table();
    adl_bundle      bundle = models::empty_bundle();
    CHECK_EQ(adl_bundle_read(&llama, DIR, &bundle), ADL_OK);
    CHECK_EQ(bundle.size, sizeof bundle);
    CHECK_EQ(bundle.format_version, 2u);
    CHECK(!bundle.is_adapter);
    CHECK_EQ(std::string(bundle.id), models::BUNDLE_ID);
    CHECK_EQ(bundle.epsilon, models::EPSILON);
    CHECK_EQ(bundle.delta_scale, models::DELTA_SCALE);
    CHECK_EQ(bundle.gradient_norm, 7.05);
    CHECK_EQ(bundle.guard, 0.05);
}

TEST(an_id_has_1_to_64_characters) {
    for (const std::string & id : {std::string(), models::BUNDLE_ID + std::string("0")}) {
        models::install();
        set_both("adlocal.bundle_id", text(id));
        check_refused("expected 1 to 64");
    }
}

TEST(a_guard_is_a_share) {
    for (const double value : {-0.1, 1.1, std::numeric_limits<double>::infinity()}) {
        models::install();
        set_both("adlocal.guard", f64(value));
        check_refused("expected 0 to 1");
    }
}

// As in Python, NaN is not even the same as the other half's.
TEST(no_number_may_be_nan) {
    for (const char * key : {"adlocal.guard", "adlocal.epsilon", "adlocal.gradient.loss"}) {
        models::install();
        set_both(key, f64(std::numeric_limits<double>::quiet_NaN()));
        check_refused(std::string("the halves disagree on ") + key);
    }
}

TEST(arrays_may_be_empty) {
    models::install();
    set_both("adlocal.carriers.names", texts({}));
    set_both("adlocal.sweep.slope", f64s({}));
    const adl_llama llama  = fake_llama_table();
    adl_bundle      bundle = models::empty_bundle();
    CHECK_EQ(adl_bundle_read(&llama, DIR, &bundle), ADL_OK);
}

TEST(keys_may_be_in_any_order_and_others_beside_them) {
    models::install();
    file(PLUS).keys["aaa"]   = u32(1); // moves every index of one half
    file(MINUS).keys["zzz"]  = text("");
    const adl_llama llama  = fake_llama_table();
    adl_bundle      bundle = models::empty_bundle();
    CHECK_EQ(adl_bundle_read(&llama, DIR, &bundle), ADL_OK);
}

TEST(arguments_are_checked) {
    models::install();
    const adl_llama llama = fake_llama_table();
    CHECK_EQ(adl_bundle_read(&llama, DIR, nullptr), ADL_ERROR_INPUT);
    check_refused("adlocal convert", nullptr);
    check_refused("nowhere/proxy-plus.gguf", "nowhere");
    check_refused("proxy-plus.gguf", "");
}

TEST(a_bundle_of_another_size_is_not_written) {
    models::install();
    const adl_llama llama = fake_llama_table();
    for (const size_t size : {size_t{0}, sizeof(adl_bundle) - 8, sizeof(adl_bundle) + 8}) {
        adl_bundle bundle = models::empty_bundle();
        bundle.size       = size;
        CHECK_EQ(adl_bundle_read(&llama, DIR, &bundle), ADL_ERROR_INPUT);
        CHECK_CONTAINS(adl_last_error(), "struct adl_bundle has " + std::to_string(size) + " bytes in the host");
        CHECK_EQ(bundle.size, size);
        CHECK_EQ(bundle.epsilon, 0.0);
    }
}

TEST(a_missing_half_is_named) {
    for (const char * path : {PLUS, MINUS}) {
        models::install();
        remove_file(path);
        check_refused(path);
        check_refused("adlocal convert");
    }
}

TEST(a_gguf_that_is_no_bundle_is_named) {
    for (const char * path : {PLUS, MINUS}) {
        models::install();
        file(path).keys = {{"general.architecture", text("llama")}};
        check_refused(path);
        check_refused("no part of a bundle");
    }
}

TEST(another_format_is_refused) {
    for (const char * path : {PLUS, MINUS}) {
        models::install();
        file(path).keys["adlocal.format_version"] = u32(3);
        check_refused("upgrade adlocal");
        check_refused(path);
        file(path).keys["adlocal.format_version"] = u32(0);
        check_refused("convert again");
    }
    models::install(); // a newer one may lack any key but this
    set_both("adlocal.format_version", u32(7));
    file(PLUS).keys.erase("adlocal.epsilon");
    file(PLUS).keys.erase("adlocal.sign");
    check_refused("bundle format 7");
}

TEST(swapped_halves_are_told) {
    models::install();
    std::swap(file(PLUS), file(MINUS));
    check_refused("swapped");
}

TEST(other_signs_are_refused) {
    for (const auto & [plus, minus] : {std::pair<int, int>{1, 1}, {-1, -1}, {0, 0}, {1, 0}, {0, -1}, {2, -2}, {1, -2}}) {
        models::install();
        file(PLUS).keys["adlocal.sign"]  = i32(plus);
        file(MINUS).keys["adlocal.sign"] = i32(minus);
        check_refused(std::to_string(plus) + ", " + std::to_string(minus));
    }
}

TEST(halves_of_two_bundles_are_refused) {
    models::install();
    file(MINUS).keys["adlocal.bundle_id"] = text("fedcba9876543210");
    check_refused("fedcba987654");
    check_refused("0123456789ab");
    check_refused("one conversion");
}

TEST(every_key_is_needed_in_both_halves) {
    for (const char * path : {PLUS, MINUS}) {
        for (const auto & [key, value] : models::keys(1)) {
            if (key.rfind("adlocal.", 0) == 0 && key != "adlocal.format_version") { // without that it is no bundle, see above
                models::install();
                file(path).keys.erase(key);
                check_refused(std::string(path) + ": key " + key + " is missing");
            }
        }
    }
}

TEST(every_key_is_the_same_in_both_halves) {
    for (const auto & [key, value] : models::keys(1)) {
        if (key.rfind("adlocal.", 0) == 0 && key != "adlocal.format_version" && key != "adlocal.sign" && key != "adlocal.bundle_id") {
            models::install();
            file(MINUS).keys[key] = changed(value);
            check_refused("disagree on " + key);
        }
    }
}

TEST(arrays_of_another_length_differ) {
    for (const auto & [key, value] : models::keys(1)) {
        if (value.type == GGUF_TYPE_ARRAY) {
            models::install();
            Value & v = file(PLUS).keys[key];
            v.strings.empty() ? v.bytes.resize(v.bytes.size() / 2) : v.strings.resize(1);
            check_refused("disagree on " + key);
        }
    }
}

TEST(every_key_has_its_type) {
    for (const char * path : {PLUS, MINUS}) {
        for (const auto & [key, value] : models::keys(path == PLUS ? 1 : -1)) {
            if (key.rfind("adlocal.", 0) == 0) {
                models::install();
                file(path).keys[key] = of_other_type(value);
                check_refused("key " + key + " is of");
            }
        }
    }
}

TEST(an_array_of_another_type_is_refused) {
    models::install();
    set_both("adlocal.carriers.names", f64s({1, 2}));
    check_refused("adlocal.carriers.names");
    models::install();
    set_both("adlocal.sweep.p10", texts({"1", "2"}));
    check_refused("adlocal.sweep.p10");
    models::install();
    set_both("adlocal.epsilon", f64s({1}));
    check_refused("adlocal.epsilon");
}

TEST(tensors_must_be_alike) {
    for (int i = 0; i < 4; ++i) {
        models::install();
        std::vector<Tensor> & tensors = file(i % 2 ? PLUS : MINUS).tensors;
        switch (i / 2) {
            case 0:  tensors[1].name = "blk.0.attn_q.weight"; break;
            default: tensors[2].type = GGML_TYPE_F32; break;
        }
        check_refused("different tensors");
    }
    for (const char * path : {PLUS, MINUS}) {
        models::install();
        file(path).tensors.pop_back();
        check_refused("different tensors");
        file(path).tensors.clear();
        check_refused("different tensors");
    }
}

TEST(lists_have_an_element_a_capability) {
    for (const char * key : {"weights", "norms", "losses", "traces", "sha256", "cosines"}) {
        models::install();
        const std::string name = std::string("adlocal.capabilities.") + key;
        Value             v    = file(PLUS).keys[name];
        v.strings.empty() ? v.bytes.resize(v.bytes.size() / 2) : v.strings.resize(1);
        set_both(name, v);
        check_refused(name + " has");
    }
    for (const auto & hashes : {std::vector<std::string>{}, {"a"}, {"a", "b", "c"}}) {
        models::install();
        set_both("adlocal.carriers.sha256", texts(hashes));
        check_refused("expected 2");
    }
}

TEST(halves_that_say_another_format_are_refused) {
    for (const char * name : {"adapter", "", "quarters"}) {
        models::install();
        set_both("adlocal.format", text(name));
        check_refused(std::string("say format '") + name + "', expected 'halves'");
    }
}

TEST(sizes_must_be_positive_numbers) {
    const double inf = std::numeric_limits<double>::infinity();
    for (const char * key : {"adlocal.epsilon", "adlocal.delta_scale", "adlocal.gradient.norm"}) {
        for (const double value : {0.0, -0.0, -1.0, inf, -inf}) {
            models::install();
            set_both(key, f64(value));
            check_refused("expected a positive number");
        }
    }
}

} // namespace

MAIN
