// A toy llama.cpp, linked statically into each test: it defines llama.h's functions for models that are a few lines of
// description. A logit depends on the model's seed and on every token and position that its sequence holds, so a memory
// operation that went wrong shows. What would end the process in the real one is kept as a violation, which fails the test.

#pragma once

#include "adlocal.h"

#include <chrono>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fake {

// A GGUF value. `element` is the type of an array's elements.
struct Value {
    gguf_type                type    = GGUF_TYPE_UINT32;
    gguf_type                element = GGUF_TYPE_COUNT;
    std::vector<uint8_t>     bytes;   // of numbers, and of arrays of them
    std::vector<std::string> strings; // one, or those of an array
};

Value u32(uint32_t value);
Value i32(int32_t value);
Value u64(uint64_t value);
Value f32(float value);
Value f64(double value);
Value boolean(bool value);
Value text(std::string value);
Value texts(std::vector<std::string> values);
Value f64s(const std::vector<double> & values);
Value u32s(const std::vector<uint32_t> & values);

struct Tensor {
    std::string name;
    ggml_type   type;
};

struct Vocab {
    std::vector<std::string>           texts;
    std::vector<llama_token_attr>      attrs;
    std::set<llama_token>              ends; // end-of-generation
    std::map<std::string, llama_token> roles; // "bos", "eos", ...; one that is missing is -1
};

enum class Throws { NOTHING, EXCEPTION, NUMBER };

// What llama.cpp does wrong with the models and contexts of one file.
struct Faults {
    bool    load        = false; // the model is not loaded
    bool    context     = false; // no context is made for it
    bool    adapter     = false; // the adapter is not loaded
    int     set_in      = 0;     // the llama_set_adapters_lora this many calls from now refuses the adapter, 1 being the next
    bool    set_always  = false; // and all that come after it
    int     decode_in   = 0;     // the llama_decode this many calls from now goes wrong, 1 being the next; 0: none
    int32_t decode_code = -3;    // and returns this
    Throws  throws      = Throws::NOTHING; // or throws instead
    std::map<llama_token, float> logits; // forced into every row
};

struct File {
    bool                         is_model = true; // else metadata alone, or an adapter
    bool                         is_adapter = false;
    std::map<std::string, Value> keys;
    std::vector<Tensor>          tensors;
    Vocab                        vocab;
    int32_t                      n_ctx_train = 2048;
    uint64_t                     seed        = 1; // the model
    uint64_t                     own_seed    = 0; // what tells a half from the other, or an adapter's part
    float                        own_scale   = 0; // of its part in a logit, an adapter's at scale 1
    bool                         recurrent   = false; // the memory forgets all of a sequence or nothing, and copies all of it
    int32_t                      n_swa       = 0; // the memory loses what one sequence alone has and its next token does not see
    Faults                       faults;
};

struct Settings {
    const char *              version          = ADL_LLAMA_VERSION;
    bool                      supports_offload = false;
    uint32_t                  n_ctx_multiple   = 8; // a context's size is rounded up to it
    std::chrono::microseconds decode_time{0};       // llama_decode sleeps that long
    std::chrono::microseconds lifecycle_time{0};    // and so does making or freeing a context
    bool                      one_queue  = false;   // two decodes at once wait for each other, and lose a little by it
    bool                      rendezvous = false;   // a decode waits for one in another thread, 5 s at most
};

struct Counts {
    int models = 0, contexts = 0, adapters = 0, ggufs = 0, samplers = 0; // alive
    int loads                  = 0; // models that were loaded
    int decodes                = 0; // llama_decode calls of all contexts
    int max_together           = 0; // decodes at once
    int max_threads            = 0; // sum over decodes at once, single tokens
    int max_threads_batch      = 0; // and longer batches
    int max_lifecycle_together = 0; // contexts that are made or freed at once
    std::set<std::thread::id> decode_threads;
};

// The files of the toy's disk, its settings and counters. Change them between calls only.
File &     file(const std::string & path); // made if it is not there
void       remove_file(const std::string & path);
Settings & settings();
Counts &   counts();

// Forgets files, settings and counters, but not what is alive.
void reset();

// What would have ended the process, "" if nothing. Cleared by reset.
std::string violations();

// The logits that a model of that file gives after `tokens` from position 0.
std::vector<float> logits(const std::string & path, const std::vector<llama_token> & tokens);

// The same with an adapter attached at a scale.
std::vector<float> logits(const std::string & path, const std::string & adapter, float scale, const std::vector<llama_token> & tokens);

// What a context's memory holds of a sequence: positions and tokens.
std::vector<std::pair<llama_pos, llama_token>> memory(const llama_context * ctx, llama_seq_id seq_id);

int                  n_decodes(const llama_context * ctx);
std::vector<int32_t> batches(const llama_context * ctx);         // how many tokens each decode had
int                  n_synchronizes(const llama_context * ctx);
int                  n_threads(const llama_context * ctx);       // as last set
int                  n_threads_batch(const llama_context * ctx);
llama_context_params context_params(const llama_context * ctx);  // as given to llama_init_from_model
llama_model_params   model_params(const llama_model * model);
float                scale(const llama_context * ctx);           // of the adapter that is attached, 0 if none is

// Is this thread inside of one of the toy's functions? Its own allocations are not to be made to fail.
bool inside();

} // namespace fake

// A table filled as a C or C++ host does that links llama.cpp.
adl_llama fake_llama_table();
