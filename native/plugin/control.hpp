// The control file (adlocal-control.h), as the program that made it has it.

#pragma once

#include "adlocal-control.h"
#include "adlocal.h"
#include "think.hpp"

#include <string>

namespace plugin {

struct Config;

// What a sequence is protected with until it begins again.
struct Latched {
    adl_row_params params;
    Think          think;
    bool           closed; // what was asked for makes no sense: no row of it may be read
};

class Control {
  public:
    // Without a directory, and where no file can be made in it, the same in memory of its own.
    explicit Control(const Config & config);

    // What a sequence that begins is protected with, of a context whose model has `n_vocab` tokens.
    Latched latch(llama_seq_id seq_id, int32_t n_vocab);

    // What the program was started with.
    adl_row_params floor() const { return {floor_.strength, floor_.guard, floor_.mode, false}; }

    // A copy of a sequence is protected as the sequence.
    void copy(llama_seq_id source, llama_seq_id target);

    // A call that evaluates has begun, or ended. Any thread may say so.
    void decode_begins() { __atomic_fetch_add(&control_->n_decodes_begun, 1, __ATOMIC_SEQ_CST); }
    void decode_ends() { __atomic_fetch_add(&control_->n_decodes_ended, 1, __ATOMIC_SEQ_CST); }

    adl_control_counters & counters(llama_seq_id seq_id) { return control_->sequences[seq_id].counters; }

    // Removes this process's file, if it has one; a child that inherited it leaves it alone.
    static void remove_file();

  private:
    // Makes the file under a name that nobody looks for, and locks it; "" and errno where that fails.
    std::string map(const std::string & directory);

    // Gives it its name, now that it is whole.
    static void show(const std::string & unfinished);

    const adl_control_settings floor_; // the file's is for others to read: who writes there changes nothing here
    adl_control *              control_ = nullptr;
};

} // namespace plugin
