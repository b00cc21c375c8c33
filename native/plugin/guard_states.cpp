// States are saved and restored.

#include "guard.hpp"
#include "states.hpp"

#include <cstring>

using plugin::Context;
using plugin::find;
using plugin::real;

namespace {

llama_seq_id last_seq(const Context & c) {
    return static_cast<llama_seq_id>(c.n_seq_max) - 1;
}

// llama.cpp's own bytes, and the trailer after them.
template <typename Get>
size_t get_state(const Context & c, llama_seq_id first, llama_seq_id last, uint8_t * dst, size_t size, Get && get) {
    const auto bytes = plugin::trailer(c, first, last);
    if (dst == nullptr || size < bytes.size()) {
        return 0;
    }
    const size_t own = get(size - bytes.size());
    if (own == 0) {
        return 0;
    }
    std::memcpy(dst + own, bytes.data(), bytes.size());
    return own + bytes.size();
}

template <typename Set>
size_t set_state(Context & c, llama_seq_id target, const uint8_t * src, size_t size, Set && set) {
    const size_t own = plugin::own_size(src, size);
    if (own == 0) {
        plugin::say("a saved state says nothing of its tokens, so the pair cannot follow it; it is not restored");
        return 0;
    }
    if (set(own) == 0) {
        return 0;
    }
    if (!plugin::apply(c, src, size, target)) {
        c.poison("a saved state could not be followed");
        return 0;
    }
    return size;
}

bool is_refused(llama_state_seq_flags flags) {
    return (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) != 0;
}

} // namespace

ADL_GUARD size_t llama_state_get_size(llama_context * context) {
    const size_t own = real().llama_state_get_size(context);
    Context *    c   = find(context);
    return c && own ? own + plugin::trailer(*c, 0, last_seq(*c)).size() : own;
}

ADL_GUARD size_t llama_get_state_size(llama_context * context) {
    return llama_state_get_size(context);
}

ADL_GUARD size_t llama_state_get_data(llama_context * context, uint8_t * dst, size_t size) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_get_data(context, dst, size);
    }
    return get_state(*c, 0, last_seq(*c), dst, size, [&](size_t own) { return real().llama_state_get_data(context, dst, own); });
}

ADL_GUARD size_t llama_copy_state_data(llama_context * context, uint8_t * dst) {
    return llama_state_get_data(context, dst, llama_state_get_size(context));
}

ADL_GUARD size_t llama_state_set_data(llama_context * context, const uint8_t * src, size_t size) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_set_data(context, src, size);
    }
    return set_state(*c, -1, src, size, [&](size_t own) { return real().llama_state_set_data(context, src, own); });
}

// It does not say how long the state is.
ADL_GUARD size_t llama_set_state_data(llama_context * context, const uint8_t * src) {
    return find(context) ? 0 : real().llama_set_state_data(context, src);
}

ADL_GUARD size_t llama_state_seq_get_size_ext(llama_context * context, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c != nullptr && is_refused(flags)) {
        return 0;
    }
    const size_t own = real().llama_state_seq_get_size_ext(context, seq_id, flags);
    return c && own ? own + plugin::trailer(*c, seq_id, seq_id).size() : own;
}

ADL_GUARD size_t llama_state_seq_get_size(llama_context * context, llama_seq_id seq_id) {
    return llama_state_seq_get_size_ext(context, seq_id, 0);
}

ADL_GUARD size_t llama_state_seq_get_data_ext(
        llama_context * context, uint8_t * dst, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_seq_get_data_ext(context, dst, size, seq_id, flags);
    }
    const auto get = [&](size_t own) { return real().llama_state_seq_get_data_ext(context, dst, own, seq_id, flags); };
    return is_refused(flags) ? 0 : get_state(*c, seq_id, seq_id, dst, size, get);
}

ADL_GUARD size_t llama_state_seq_get_data(llama_context * context, uint8_t * dst, size_t size, llama_seq_id seq_id) {
    return llama_state_seq_get_data_ext(context, dst, size, seq_id, 0);
}

ADL_GUARD size_t llama_state_seq_set_data_ext(
        llama_context * context, const uint8_t * src, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_seq_set_data_ext(context, src, size, seq_id, flags);
    }
    const auto set = [&](size_t own) { return real().llama_state_seq_set_data_ext(context, src, own, seq_id, flags); };
    return is_refused(flags) ? 0 : set_state(*c, seq_id, src, size, set);
}

ADL_GUARD size_t llama_state_seq_set_data(llama_context * context, const uint8_t * src, size_t size, llama_seq_id seq_id) {
    return llama_state_seq_set_data_ext(context, src, size, seq_id, 0);
}

ADL_GUARD bool llama_state_save_file(llama_context * context, const char * path, const llama_token * tokens, size_t n) {
    const bool saved = real().llama_state_save_file(context, path, tokens, n);
    Context *  c     = find(context);
    return saved && (c == nullptr || plugin::append_trailer(path, plugin::trailer(*c, 0, last_seq(*c))));
}

ADL_GUARD bool llama_save_session_file(llama_context * context, const char * path, const llama_token * tokens, size_t n) {
    return llama_state_save_file(context, path, tokens, n);
}

ADL_GUARD bool llama_state_load_file(llama_context * context, const char * path, llama_token * tokens, size_t capacity, size_t * n) {
    Context * c = find(context);
    if (c == nullptr) {
        return real().llama_state_load_file(context, path, tokens, capacity, n);
    }
    const plugin::StrippedFile file(path);
    const auto load = [&](size_t) { return file.is_ours() && real().llama_state_load_file(context, file.path(), tokens, capacity, n) ? 1u : 0u; };
    return set_state(*c, -1, file.state().data(), file.state().size(), load) != 0;
}

ADL_GUARD bool llama_load_session_file(llama_context * context, const char * path, llama_token * tokens, size_t capacity, size_t * n) {
    return llama_state_load_file(context, path, tokens, capacity, n);
}

ADL_GUARD size_t llama_state_seq_save_file(
        llama_context * context, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n) {
    const size_t saved = real().llama_state_seq_save_file(context, path, seq_id, tokens, n);
    Context *    c     = find(context);
    if (c == nullptr || saved == 0) {
        return saved;
    }
    const auto bytes = plugin::trailer(*c, seq_id, seq_id);
    return plugin::append_trailer(path, bytes) ? saved + bytes.size() : 0;
}

ADL_GUARD size_t llama_state_seq_load_file(
        llama_context * context, const char * path, llama_seq_id seq_id, llama_token * tokens, size_t capacity, size_t * n) {
    Context * c = find(context);
    if (c == nullptr || tokens == nullptr) { // without tokens it says how many there are, and restores nothing
        return real().llama_state_seq_load_file(context, path, seq_id, tokens, capacity, n);
    }
    const plugin::StrippedFile file(path);
    const auto load = [&](size_t) -> size_t {
        return file.is_ours() ? real().llama_state_seq_load_file(context, file.path(), seq_id, tokens, capacity, n) : 0;
    };
    return set_state(*c, seq_id, file.state().data(), file.state().size(), load);
}
