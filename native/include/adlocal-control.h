// The control file: shared memory of a protected program and of what drives or watches it, such as `adlocal status`.
//
// A program under `adlocal run` makes one when it first uses llama.cpp: DIRECTORY/PID.control, mode 0600, the directory of the
// user alone. The program holds a lock on it (flock) as long as it lives, so a file that can be locked is left over, and it
// removes the file when it ends. A child is a program of its own, with a file of its own.
//
// Another program may change the settings of a sequence:
//
//     s->epoch |= 1;  s->strength = ...; and the others;  s->epoch += 1;      in this order
//
// They are read when the sequence begins: when it is first decoded after its memory was cleared, after more was cut off than
// its last batch, after a state was restored that does not merely take back a draft, after the program called llama_set_sampler
// for it (llama-server does between any two requests), and when a prompt follows what was sampled. From then on it keeps them:
// what is left of a request that was cancelled is protected as that request was. A sequence that is copied takes its settings
// along. In a program that never calls llama_set_sampler, a request that adds a single token to what the sequence holds cannot
// be told from one that goes on, and keeps the settings of the one before.
//
// No file lowers protection. A sequence is given what it asks for where that is more than the program was started with (the
// `floor`), a higher strength or a lower guard, and the floor otherwise. Settings that are no numbers, or that somebody began
// to write and never finished, close the rows of their sequence.
//
// A sequence may be kept from reasoning (`think_state`): two tokens, those that begin and end it, are then −inf in its rows,
// whatever else is done to them and at whatever strength. A token is sampled that comes after the request's first row; a prompt
// is decoded without rows but for its last token. Tokens that are cut off again, as drafts are, were never sampled.
//
// Fields are of one machine: its byte order, its alignment.

#ifndef ADLOCAL_CONTROL_H
#define ADLOCAL_CONTROL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ADL_CONTROL_MAGIC     "adlctrl" // and its 0
#define ADL_CONTROL_VERSION   2
#define ADL_CONTROL_N_SEQ_MAX 256 // as many as llama.cpp has

enum adl_think_state {
    ADL_THINK_ALLOWED = 0, // nothing is banned
    ADL_THINK_ONCE    = 1, // both tokens are, after the first `think_close` that was sampled
    ADL_THINK_NEVER   = 2, // both are, in every row
};

struct adl_control_settings {
    uint64_t epoch;       // 0: never written, which asks for nothing; odd: being written
    double   strength;    // nats
    double   guard;       // share of the top token's probability, 0 to 1
    int32_t  mode;        // enum adl_mode
    int32_t  think_open;  // the token that begins reasoning; −1 for none
    int32_t  think_close; // the one that ends it; −1 for none, which makes no sense with ADL_THINK_ONCE
    int32_t  think_state; // enum adl_think_state
};

// What has become of a sequence since the program began; numbers only grow. `n_decoded` grows when a decode has ended well, by all
// of its batch: a long prompt comes in batches. Contexts of one program have their sequences in common here.
struct adl_control_counters {
    uint64_t n_begun;     // how often its settings were read
    uint64_t n_decoded;   // tokens that the program has decoded for it: of prompts, sampled, and drafted
    uint64_t n_rows;      // rows that the program could sample from, those of drafts too
    uint64_t n_choices;   // of these, where at least two tokens passed the guard
    uint64_t n_evaluated; // of these, where the pair was evaluated
    uint64_t n_closed;    // rows that were closed instead: Δ could not be computed, the settings made no sense, or all was banned
    uint64_t n_dosed;     // tokens that came back after a row that has doses
    double   kl;          // KL(adjusted ‖ teacher), summed over rows, nats
    double   dose;        // summed over `n_dosed` tokens
};

struct adl_control_sequence {
    struct adl_control_settings asked;    // written by others
    struct adl_control_settings in_force; // written by the program: with the epoch of what was asked
    struct adl_control_counters counters; // written by the program
};

struct adl_control {
    char                        magic[8];
    uint32_t                    version;
    uint32_t                    size; // sizeof(struct adl_control)
    uint32_t                    n_seq_max;
    uint32_t                    pid;
    int64_t                     started;      // seconds since 1970
    char                        program[64];  // its short name
    char                        bundle[1024]; // directory
    struct adl_control_settings floor;
    uint64_t                    n_decodes_begun; // calls of llama_decode, llama_encode and llama_process, on protected contexts
    uint64_t                    n_decodes_ended; // of these, the ones that came back, with errors too; atomic, as n_decodes_begun is
    struct adl_control_sequence sequences[ADL_CONTROL_N_SEQ_MAX];
};

#ifdef __cplusplus
}
#endif

#endif
