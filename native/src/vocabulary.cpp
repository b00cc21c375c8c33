// Do teacher and proxy number their tokens alike? Their ids are exchanged as they are, never as text.

#include "vocabulary.hpp"

#include "error.hpp"
#include "llama_table.hpp"

#include <algorithm>
#include <cstring>

namespace adl {

namespace {

bool same_text(const char * a, const char * b) {
    return a == nullptr || b == nullptr ? a == b : std::strcmp(a, b) == 0;
}

std::string brief(const char * text) {
    return text == nullptr ? "nothing" : std::string(text, cut(text, 64));
}

void check_token(const adl_llama & llama, const llama_vocab * teacher, const llama_vocab * proxy, llama_token token) {
    const char *          ours = llama.llama_vocab_get_text(teacher, token), *theirs = llama.llama_vocab_get_text(proxy, token);
    const llama_token_attr our_type = llama.llama_vocab_get_attr(teacher, token), their_type = llama.llama_vocab_get_attr(proxy, token);
    if (!same_text(ours, theirs) || our_type != their_type) {
        throw Error{ADL_ERROR_VOCABULARY,
                    format("token %d is '%s' (type %d) to the teacher and '%s' (type %d) to the proxy; "
                           "convert a proxy that shares the teacher's tokenizer",
                           token, brief(ours).c_str(), our_type, brief(theirs).c_str(), their_type)};
    }
}

// The roles that special tokens play may differ (a base model's end of sequence is often another token than its chat
// version's), because Δ compares ids and does not read roles; but the proxy must have the tokens.
void check_special_tokens(const adl_llama & llama, const llama_vocab * teacher, int32_t n_shared) {
    for (auto role : {llama.llama_vocab_bos, llama.llama_vocab_eos, llama.llama_vocab_eot, llama.llama_vocab_sep, llama.llama_vocab_nl,
                      llama.llama_vocab_pad, llama.llama_vocab_fim_pre, llama.llama_vocab_fim_suf, llama.llama_vocab_fim_mid,
                      llama.llama_vocab_fim_pad, llama.llama_vocab_fim_rep, llama.llama_vocab_fim_sep}) {
        const llama_token token = role(teacher);
        if (token >= n_shared) {
            throw Error{ADL_ERROR_VOCABULARY,
                        format("the teacher's special token %d lies beyond the proxy's %d tokens; "
                               "convert a proxy that shares the teacher's tokenizer",
                               token, n_shared)};
        }
    }
}

} // namespace

int32_t shared_vocabulary(const adl_llama & llama, const llama_model * teacher, const llama_model * proxy) {
    const llama_vocab * ours     = llama.llama_model_get_vocab(teacher);
    const llama_vocab * theirs   = llama.llama_model_get_vocab(proxy);
    const int32_t       n_shared = std::min(llama.llama_vocab_n_tokens(ours), llama.llama_vocab_n_tokens(theirs));
    if (n_shared <= 0) {
        throw Error{ADL_ERROR_VOCABULARY, "the teacher or the proxy has no vocabulary; both need the tokenizer they were trained with"};
    }
    for (llama_token token = 0; token < n_shared; ++token) {
        check_token(llama, ours, theirs, token);
    }
    check_special_tokens(llama, ours, n_shared);
    return n_shared;
}

std::vector<llama_token> end_tokens(const adl_llama & llama, const llama_vocab * vocab) {
    std::vector<llama_token> tokens;
    for (llama_token token = 0; token < llama.llama_vocab_n_tokens(vocab); ++token) {
        if (llama.llama_vocab_is_eog(vocab, token)) {
            tokens.push_back(token);
        }
    }
    return tokens;
}

} // namespace adl

int32_t adl_vocab_shared(const struct adl_llama * llama, const struct llama_model * teacher, const struct llama_model * proxy) {
    return adl::status_of([&] {
        adl::check(llama);
        if (teacher == nullptr || proxy == nullptr) {
            throw adl::Error{ADL_ERROR_INPUT, "adl_vocab_shared: a model is NULL"};
        }
        return adl::shared_vocabulary(*llama, teacher, proxy);
    });
}
