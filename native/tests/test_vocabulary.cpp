// Whether teacher and proxy number their tokens alike.

#include "check.hpp"
#include "models.hpp"

namespace {

using namespace models;

constexpr const char * PROXY = PLUS;

int32_t shared() {
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load(), *proxy = load(PROXY);
    const int32_t   n = adl_vocab_shared(&llama, teacher, proxy);
    llama_model_free(teacher);
    llama_model_free(proxy);
    return n;
}

void check_refused(const std::string & words) {
    CHECK_EQ(shared(), ADL_ERROR_VOCABULARY);
    CHECK_CONTAINS(adl_last_error(), words);
}

// Is every lead byte followed by as many continuation bytes as it says?
bool is_utf8(const std::string & text) {
    for (size_t i = 0; i < text.size();) {
        const auto   lead = static_cast<unsigned char>(text[i]);
        const size_t n    = lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 0;
        for (size_t k = 1; k < n; ++k) {
            if (i + k >= text.size() || (static_cast<unsigned char>(text[i + k]) & 0xc0) != 0x80) {
                return false;
            }
        }
        if (n == 0) {
            return false;
        }
        i += n;
    }
    return true;
}

TEST(padding_may_make_either_longer) {
    install();
    CHECK_EQ(shared(), N_PROXY);
    fake::file(TEACHER).vocab = vocab(50);
    CHECK_EQ(shared(), 50);
    fake::file(TEACHER).vocab = vocab(N_PROXY);
    CHECK_EQ(shared(), N_PROXY);
}

TEST(the_first_text_that_differs_is_named) {
    install();
    fake::file(PROXY).vocab.texts[33] = "later";
    fake::file(PROXY).vocab.texts[17] = "other";
    check_refused("token 17 is 't17' (type 4) to the teacher and 'other' (type 4) to the proxy");
    fake::file(PROXY).vocab.texts[17] = "";
    check_refused("token 17");
    install();
    fake::file(TEACHER).vocab.texts[N_PROXY - 1] = "last";
    check_refused("token 63 is 'last'");
}

TEST(a_type_that_differs_is_named) {
    install();
    fake::file(PROXY).vocab.attrs[0] = LLAMA_TOKEN_ATTR_NORMAL;
    check_refused("token 0 is 't0' (type 8) to the teacher and 't0' (type 4) to the proxy");
}

TEST(a_long_text_does_not_overflow_the_message) {
    install();
    fake::file(PROXY).vocab.texts[5] = std::string(5000, 'x');
    check_refused("token 5 is 't5'");
}

// adlocal.h: strings are UTF-8. A binding may refuse to read one that ends in the middle of a character.
TEST(a_text_that_is_cut_is_cut_between_characters) {
    for (size_t n_before = 0; n_before < 8; ++n_before) {
        install();
        std::string text(n_before, 'x');
        for (int i = 0; i < 1000; ++i) {
            text += i % 2 ? "Ġ" : "ε₊"; // of two and three bytes
        }
        fake::file(PROXY).vocab.texts[5] = text;
        check_refused("token 5");
        CHECK(is_utf8(adl_last_error()));
        const adl_llama llama  = fake_llama_table();
        adl_bundle      bundle = empty_bundle();
        CHECK_EQ(adl_bundle_read(&llama, text.c_str(), &bundle), ADL_ERROR_BUNDLE);
        CHECK(is_utf8(adl_last_error()));
    }
}

TEST(special_tokens_must_be_shared) {
    for (const char * role : {"bos", "eos", "eot", "sep", "nl", "pad", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"}) {
        install();
        fake::file(TEACHER).vocab.roles[role] = N_PROXY + 3;
        check_refused("special token 67");
    }
}

TEST(roles_may_differ) {
    install();
    fake::file(PROXY).vocab.roles           = {{"bos", 5}, {"eos", 6}, {"pad", 7}};
    fake::file(PROXY).vocab.ends            = {6};
    fake::file(TEACHER).vocab.roles["pad"]  = N_PROXY - 1;
    CHECK_EQ(shared(), N_PROXY);
}

TEST(models_are_needed) {
    install();
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    CHECK_EQ(adl_vocab_shared(&llama, nullptr, teacher), ADL_ERROR_INPUT);
    CHECK_EQ(adl_vocab_shared(&llama, teacher, nullptr), ADL_ERROR_INPUT);
    llama_model_free(teacher);
}

// A vocabulary of no tokens (`tokenizer.ggml.model = none` without a size) shares nothing.
TEST(no_tokens_are_no_vocabulary) {
    install();
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    adl_llama       none    = llama;
    none.llama_vocab_n_tokens = [](const llama_vocab *) { return 0; };
    CHECK_EQ(adl_vocab_shared(&none, teacher, teacher), ADL_ERROR_VOCABULARY);
    CHECK_CONTAINS(adl_last_error(), "no vocabulary");
    llama_model_free(teacher);
}

} // namespace

MAIN
