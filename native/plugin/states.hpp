// What a saved state carries besides llama.cpp's own: which tokens its sequences hold, so that the pair can follow.

#pragma once

#include "process.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace plugin {

// The trailer of some sequences as they are: tokens, positions, a check, and its own length at the end.
std::vector<uint8_t> trailer(const Context & context, llama_seq_id first, llama_seq_id last);

// Bytes of llama.cpp's own in a state that ends in a trailer; 0 where it has none, or a broken one.
size_t own_size(const uint8_t * state, size_t size);

// Tells the lockstep what a state that was restored holds. `target` is the sequence that one sequence went to, −1 for all.
bool apply(Context & context, const uint8_t * state, size_t size, llama_seq_id target);

// The same for files: a trailer after what llama.cpp wrote, and a copy without it for llama.cpp to read.
bool append_trailer(const char * path, const std::vector<uint8_t> & bytes);

class StrippedFile {
  public:
    explicit StrippedFile(const char * path);
    ~StrippedFile();
    bool                         is_ours() const { return !path_.empty(); }
    const char *                 path() const { return path_.c_str(); }
    const std::vector<uint8_t> & state() const { return bytes_; }

  private:
    std::vector<uint8_t> bytes_;
    std::string          path_;
};

} // namespace plugin
