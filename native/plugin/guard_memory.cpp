// Memory is cleared, cut and copied.

#include "guard.hpp"

using plugin::Context;
using plugin::find;
using plugin::real;

ADL_GUARD void llama_memory_clear(llama_memory_t memory, bool data) {
    if (Context * c = find(memory)) {
        c->clear();
    } else {
        real().llama_memory_clear(memory, data);
    }
}

ADL_GUARD bool llama_memory_seq_rm(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    Context * c = find(memory);
    return c ? c->seq_rm(seq_id, p0, p1) : real().llama_memory_seq_rm(memory, seq_id, p0, p1);
}

ADL_GUARD void llama_memory_seq_cp(llama_memory_t memory, llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    Context * c = find(memory);
    if (c == nullptr) {
        real().llama_memory_seq_cp(memory, source, target, p0, p1);
    } else {
        c->seq_cp(source, target, p0, p1);
    }
}

ADL_GUARD void llama_memory_seq_keep(llama_memory_t memory, llama_seq_id seq_id) {
    if (Context * c = find(memory)) {
        c->seq_keep(seq_id);
    } else {
        real().llama_memory_seq_keep(memory, seq_id);
    }
}

// Programs ask llama_memory_can_shift first, and are told no.
ADL_GUARD void llama_memory_seq_add(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos delta) {
    if (Context * c = find(memory)) {
        c->poison("the program shifts the context (llama_memory_seq_add), which the pair cannot follow");
    } else {
        real().llama_memory_seq_add(memory, seq_id, p0, p1, delta);
    }
}

ADL_GUARD void llama_memory_seq_div(llama_memory_t memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (Context * c = find(memory)) {
        c->poison("the program divides positions (llama_memory_seq_div), which the pair cannot follow");
    } else {
        real().llama_memory_seq_div(memory, seq_id, p0, p1, d);
    }
}

ADL_GUARD bool llama_memory_can_shift(llama_memory_t memory) {
    return find(memory) == nullptr && real().llama_memory_can_shift(memory);
}
