// The toy teacher and the toy bundle that tests share.

#pragma once

#include "fake_llama.hpp"

namespace models {

constexpr int32_t N_TEACHER = 72; // padded: the last eight are no tokens of the proxies'
constexpr int32_t N_PROXY   = 64;
constexpr double  EPSILON     = 0.01;
constexpr double  DELTA_SCALE = 0.75;

constexpr llama_token BOS = 0, EOS = 1, EOT = 2; // the last two end a generation
constexpr llama_token TEACHER_ENDS[] = {EOS, EOT};

constexpr const char * TEACHER = "teacher.gguf";
constexpr const char * DIR     = "bundle";
constexpr const char * PLUS    = "bundle/proxy-plus.gguf";
constexpr const char * MINUS   = "bundle/proxy-minus.gguf";
constexpr const char * ADAPTER_DIR = "toy-adapter-bundle";
constexpr const char * BASE        = "toy-adapter-bundle/proxy-base.gguf";
constexpr const char * ADAPTER     = "toy-adapter-bundle/proxy-adapter.gguf";
constexpr const char * BUNDLE_ID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fake::Vocab vocab(int32_t n);

// Every key of a half; `sign` is +1 or −1.
std::map<std::string, fake::Value> keys(int32_t sign);

// What adl_bundle_read is given.
adl_bundle empty_bundle();

// Starts a test: forgets what was, and writes the teacher and the bundle.
void install();

// The same with an adapter bundle beside it. Its two files are there on the real disk too, empty: the core looks by itself
// which files a directory holds.
void install_adapter();

// A model as the host loads it.
llama_model * load(const char * path = TEACHER);

// Parameters for one pair: a context of 128 tokens, batches of 32, up to 4 sequences and 16 rows.
adl_pair_params params();

using Tokens = std::vector<llama_token>;

// A batch and what it points to.
class Batch {
  public:
    Batch() = default;
    explicit Batch(const Tokens & tokens, llama_pos first = 0); // of sequence 0, the last token is an output

    Batch &     add(llama_token token, llama_pos pos, std::vector<llama_seq_id> seq_ids, bool output);
    llama_batch get(); // valid until the next add

  private:
    Tokens                                 tokens_;
    std::vector<llama_pos>                 pos_;
    std::vector<std::vector<llama_seq_id>> seq_ids_;
    std::vector<int8_t>                    outputs_;
    std::vector<int32_t>                   n_seq_id_;
    std::vector<llama_seq_id *>            pointers_;
};

// A teacher's model and a pair made for it, freed together.
struct Host {
    explicit Host(const adl_pair_params & params = models::params(), const char * dir = DIR);
    ~Host();
    Host(const Host &)             = delete;
    Host & operator=(const Host &) = delete;

    llama_model * teacher;
    adl_pair *    pair;
};

// A teacher's context beside it, of four sequences, and their lockstep.
struct Stepped : Host {
    explicit Stepped(const adl_pair_params & params = models::params(), bool full = false);
    ~Stepped();

    llama_context * context;
    adl_lockstep *  lockstep;
};

// How many tokens each decode of the pair had, the same in both proxies: "32 5 1". Without the first `n_before`.
std::string batches(const adl_pair * pair, size_t n_before = 0);

// Does the row hold end-of-generation at 0 and everything else at one logit so low that it has no probability?
bool is_closed(const float * row, int32_t n = N_TEACHER);

} // namespace models
