// Batches are built and decoded.

#include "guard.hpp"
#include "batches.hpp"

using plugin::Context;
using plugin::find;
using plugin::real;

namespace {

// A call on a protected context, from here to its end.
class Counted {
  public:
    Counted() { plugin::Process::get().control().decode_begins(); }
    ~Counted() { plugin::Process::get().control().decode_ends(); }
    Counted(const Counted &)             = delete;
    Counted & operator=(const Counted &) = delete;
};

} // namespace

ADL_GUARD int32_t llama_encode(llama_context * context, llama_batch batch) {
    if (find(context) == nullptr) {
        return real().llama_encode(context, batch);
    }
    const Counted counted;
    return -3; // it leaves the logits of every token
}

ADL_GUARD int32_t llama_decode(llama_context * context, llama_batch batch) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_decode(context, batch);
    }
    const Counted counted;
    return c->step(batch, [&] { return real().llama_decode(context, batch); });
}

ADL_GUARD llama_batch_ext * llama_batch_ext_init(llama_context * context) {
    llama_batch_ext * batch = real().llama_batch_ext_init(context);
    if (batch != nullptr) {
        plugin::shadow_of(batch).clear();
    }
    return batch;
}

ADL_GUARD void llama_batch_ext_free(llama_batch_ext * batch) {
    plugin::forget_shadow(batch);
    real().llama_batch_ext_free(batch);
}

ADL_GUARD void llama_batch_ext_clear(llama_batch_ext * batch) {
    plugin::shadow_of(batch).clear();
    real().llama_batch_ext_clear(batch);
}

namespace {

// `i` is where llama.cpp put it, negative where it did not.
int32_t added(int32_t i, llama_batch_ext * batch, llama_seq_id seq_id, llama_token id) {
    if (i >= 0) {
        plugin::shadow_of(batch).add(seq_id, id);
    }
    return i;
}

bool flagged(bool done, llama_batch_ext * batch, int32_t i, bool value) {
    if (done) {
        plugin::shadow_of(batch).set_output(i, value);
    }
    return done;
}

// Programs also say that there is none, and offer one to a model that takes none.
bool embedded(bool done, llama_batch_ext * batch, int32_t i, const llama_embd & embd) {
    if (done && embd.data != nullptr) {
        plugin::shadow_of(batch).set_embedding(i);
    }
    return done;
}

} // namespace

ADL_GUARD int32_t llama_batch_ext_add(llama_batch_ext * batch, llama_seq_id seq_id) {
    return added(real().llama_batch_ext_add(batch, seq_id), batch, seq_id, LLAMA_TOKEN_NULL);
}

ADL_GUARD int32_t llama_batch_ext_add_token(llama_batch_ext * batch, llama_seq_id seq_id, llama_token id) {
    return added(real().llama_batch_ext_add_token(batch, seq_id, id), batch, seq_id, id);
}

ADL_GUARD int32_t llama_batch_ext_add_embd(llama_batch_ext * batch, llama_seq_id seq_id, llama_embd embd) {
    return added(real().llama_batch_ext_add_embd(batch, seq_id, embd), batch, seq_id, LLAMA_TOKEN_NULL);
}

ADL_GUARD bool llama_batch_ext_add_seq(llama_batch_ext * batch, int32_t i, llama_seq_id seq_id) {
    const bool done = real().llama_batch_ext_add_seq(batch, i, seq_id);
    if (done) {
        plugin::shadow_of(batch).add_sequence(i, seq_id);
    }
    return done;
}

ADL_GUARD bool llama_batch_ext_set_embd_token(llama_batch_ext * batch, int32_t i, llama_embd embd) {
    return embedded(real().llama_batch_ext_set_embd_token(batch, i, embd), batch, i, embd);
}

ADL_GUARD bool llama_batch_ext_set_embd_state(llama_batch_ext * batch, int32_t i, llama_embd embd) {
    return embedded(real().llama_batch_ext_set_embd_state(batch, i, embd), batch, i, embd);
}

ADL_GUARD bool llama_batch_ext_set_output_embd(llama_batch_ext * batch, int32_t i, bool value) {
    return flagged(real().llama_batch_ext_set_output_embd(batch, i, value), batch, i, value);
}

ADL_GUARD bool llama_batch_ext_set_output_logits(llama_batch_ext * batch, int32_t i, bool value) {
    return flagged(real().llama_batch_ext_set_output_logits(batch, i, value), batch, i, value);
}

ADL_GUARD bool llama_batch_ext_set_pos(llama_batch_ext * batch, int32_t i, const llama_pos * pos) {
    const bool done = real().llama_batch_ext_set_pos(batch, i, pos);
    if (done && pos != nullptr) {
        plugin::shadow_of(batch).set_position(i, *pos);
    }
    return done;
}

ADL_GUARD int32_t llama_process(llama_context * context, llama_process_type type, llama_batch_ext * batch) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_process(context, type, batch);
    }
    const Counted         counted;
    plugin::ShadowBatch & shadow = plugin::shadow_of(batch);
    if (type != LLAMA_PROCESS_TYPE_DECODE || !shadow.is_followed()) {
        plugin::say("the batch holds embeddings (multimodal input does), or is to be encoded: the pair cannot follow");
        return -3;
    }
    return c->step(shadow.view(), [&] { return real().llama_process(context, type, batch); });
}
