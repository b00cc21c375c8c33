// The handshake: a host whose llama.cpp does not fit is told what does not.

#include "check.hpp"
#include "fake_llama.hpp"

#include <string>
#include <vector>

namespace {

int32_t status_of(const adl_llama & llama) {
    return adl_llama_check(&llama);
}

// Checks that a table is refused in words that contain `words`, everywhere that a table is taken.
void check_refused(const adl_llama & llama, const char * words) {
    CHECK_EQ(status_of(llama), ADL_ERROR_LLAMA);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);

    adl_bundle bundle;
    CHECK_EQ(adl_bundle_read(&llama, "bundle", &bundle), ADL_ERROR_LLAMA);
    CHECK_EQ(adl_vocab_shared(&llama, nullptr, nullptr), ADL_ERROR_LLAMA);
    CHECK(adl_pair_init(&llama, "bundle", nullptr, {}) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);
    CHECK(adl_pair_init_from_files(&llama, "a", "b", 1, 1, nullptr, {}) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK(adl_pair_init_from_adapter(&llama, "a", "b", 1, 1, nullptr, {}) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);
}

TEST(nothing_has_failed_in_a_new_thread) {
    CHECK_EQ(adl_llama_check(nullptr), ADL_ERROR_LLAMA);
    std::thread([] {
        CHECK_EQ(std::string(adl_last_error()), "");
        CHECK_EQ(adl_last_status(), ADL_OK);
        CHECK_EQ(adl_llama_check(nullptr), ADL_ERROR_LLAMA);
    }).join();
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);
}

TEST(the_linked_table_fits) {
    CHECK_EQ(status_of(fake_llama_table()), ADL_OK);
}

TEST(sizes_that_a_host_cannot_tell_are_passed_over) {
    adl_llama llama = fake_llama_table();
#define FORGET(name) llama.sizeof_##name = 0;
    ADL_LLAMA_STRUCTS(FORGET)
    CHECK_EQ(status_of(llama), ADL_OK);
}

TEST(another_version_is_refused) {
    for (const char * version : {"0.5.1", "", ADL_LLAMA_VERSION "x"}) {
        fake::settings().version = version;
        check_refused(fake_llama_table(), ADL_LLAMA_VERSION);
        CHECK_CONTAINS(adl_last_error(), version);
    }
    fake::settings().version = nullptr;
    check_refused(fake_llama_table(), ADL_LLAMA_VERSION);
    fake::reset();
}

TEST(each_size_is_compared) {
#define CHECK_SIZE(name)                                            \
    for (const size_t other : {sizeof(name) - 1, sizeof(name) + 8, size_t{1}}) { \
        adl_llama llama      = fake_llama_table();                  \
        llama.sizeof_##name  = other;                               \
        check_refused(llama, "struct " #name " ");                  \
        CHECK_CONTAINS(adl_last_error(), std::to_string(other));    \
    }
    ADL_LLAMA_STRUCTS(CHECK_SIZE)
}

TEST(each_function_is_needed) {
#define CHECK_NEEDED(result, name, arguments) \
    {                                         \
        adl_llama llama = fake_llama_table(); \
        llama.name      = nullptr;            \
        check_refused(llama, #name);          \
    }
    ADL_LLAMA_FUNCTIONS(CHECK_NEEDED)
}

TEST(a_table_of_another_header_is_refused) {
    for (const size_t size : {size_t{0}, sizeof(adl_llama) - sizeof(void *), sizeof(adl_llama) + 8}) {
        adl_llama llama = fake_llama_table();
        llama.size      = size;
        check_refused(llama, "struct adl_llama");
        CHECK_CONTAINS(adl_last_error(), std::to_string(size));
    }
}

// Nothing beyond `size` may be read: a host with an older, shorter table has nothing there.
TEST(a_shorter_table_is_not_read_beyond_its_size) {
    const size_t         size = sizeof(size_t);
    std::vector<uint8_t> bytes(size); // ASan knows its end
    std::memcpy(bytes.data(), &size, sizeof size);
    CHECK_EQ(adl_llama_check(reinterpret_cast<const adl_llama *>(bytes.data())), ADL_ERROR_LLAMA);
}

TEST(no_table_is_refused) {
    CHECK_EQ(adl_llama_check(nullptr), ADL_ERROR_LLAMA);
    CHECK_CONTAINS(adl_last_error(), "table");
    adl_bundle bundle;
    CHECK_EQ(adl_bundle_read(nullptr, "bundle", &bundle), ADL_ERROR_LLAMA);
    CHECK(adl_pair_init(nullptr, "bundle", nullptr, {}) == nullptr);
    CHECK(adl_pair_init_from_files(nullptr, "a", "b", 1, 1, nullptr, {}) == nullptr);
}

TEST(names_are_in_the_order_of_the_table) {
#define NAME_OF_STRUCT(name) #name,
#define NAME_OF_FUNCTION(result, name, arguments) #name,
    const std::vector<std::string> structs   = {ADL_LLAMA_STRUCTS(NAME_OF_STRUCT)};
    const std::vector<std::string> functions = {ADL_LLAMA_FUNCTIONS(NAME_OF_FUNCTION)};
    for (size_t i = 0; i < structs.size(); ++i) {
        CHECK_EQ(std::string(adl_llama_struct_name(i)), structs[i]);
    }
    for (size_t i = 0; i < functions.size(); ++i) {
        CHECK_EQ(std::string(adl_llama_function_name(i)), functions[i]);
    }
    for (const size_t beyond : {size_t{0}, size_t{1}, size_t{1000}, SIZE_MAX - 200}) {
        CHECK(adl_llama_struct_name(structs.size() + beyond) == nullptr);
        CHECK(adl_llama_function_name(functions.size() + beyond) == nullptr);
    }
    // What a binding relies on: the table is its size, the structures' and the functions', and nothing between them.
    CHECK_EQ(sizeof(adl_llama), sizeof(size_t) * (1 + structs.size()) + sizeof(void *) * functions.size());
}

TEST(the_version_is_a_version) {
    int major = -1, minor = -1, patch = -1;
    CHECK_EQ(std::sscanf(adl_version(), "%d.%d.%d", &major, &minor, &patch), 3);
}

TEST(a_success_keeps_the_last_error) {
    CHECK_EQ(adl_llama_check(nullptr), ADL_ERROR_LLAMA);
    const std::string error = adl_last_error();
    CHECK_EQ(status_of(fake_llama_table()), ADL_OK);
    CHECK_EQ(std::string(adl_last_error()), error);
    CHECK_EQ(adl_last_status(), ADL_ERROR_LLAMA);
}

} // namespace

MAIN
