#include "batches.hpp"

#include <algorithm>

namespace plugin {

namespace {

std::mutex                                   mutex;
std::map<const llama_batch_ext *, ShadowBatch> & shadows() {
    static auto & all = *new std::map<const llama_batch_ext *, ShadowBatch>; // never destroyed: threads may outlive it
    return all;
}

} // namespace

void ShadowBatch::add(llama_seq_id seq_id, llama_token token) {
    tokens_.push_back({token, -1, {seq_id}, false, token == LLAMA_TOKEN_NULL});
}

void ShadowBatch::add_sequence(int32_t i, llama_seq_id seq_id) {
    if (has(i)) {
        tokens_[i].seq_ids.push_back(seq_id);
    }
}

void ShadowBatch::set_position(int32_t i, llama_pos pos) {
    if (has(i)) {
        tokens_[i].pos = pos;
    }
}

void ShadowBatch::set_output(int32_t i, bool value) {
    if (has(i)) {
        tokens_[i].output = value;
    }
}

void ShadowBatch::set_embedding(int32_t i) {
    if (has(i)) {
        tokens_[i].is_embedding = true;
    }
}

bool ShadowBatch::is_followed() const {
    return std::none_of(tokens_.begin(), tokens_.end(), [](const Token & token) { return token.is_embedding || token.pos < 0; });
}

llama_batch ShadowBatch::view() {
    ids_.clear(), pos_.clear(), n_seq_id_.clear(), seq_id_.clear(), output_.clear();
    for (Token & token : tokens_) {
        ids_.push_back(token.id);
        pos_.push_back(token.pos);
        n_seq_id_.push_back(static_cast<int32_t>(token.seq_ids.size()));
        seq_id_.push_back(token.seq_ids.data());
        output_.push_back(token.output ? 1 : 0);
    }
    return {static_cast<int32_t>(tokens_.size()), ids_.data(), nullptr, pos_.data(), n_seq_id_.data(), seq_id_.data(), output_.data()};
}

ShadowBatch & shadow_of(const llama_batch_ext * batch) {
    const std::lock_guard<std::mutex> lock(mutex);
    return shadows()[batch];
}

void forget_shadow(const llama_batch_ext * batch) {
    const std::lock_guard<std::mutex> lock(mutex);
    shadows().erase(batch);
}

} // namespace plugin
