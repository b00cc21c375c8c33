// adlocal: antidistillation sampling (arXiv 2504.13146) for programs that embed llama.cpp.
//
//     adjusted = z_T + λ (Δ − mean Δ)  among the teacher's plausible tokens,    Δ = (z₊ − z₋) / 2ε,    λ = strength / delta_scale
//
// z_T are the teacher's logits, z₊ and z₋ those of a bundle's two proxies at θ ± εĝ (`adlocal convert` writes it): the pair.
// A bundle holds either both proxies as files, the halves, or the proxy at θ and ĝ as a LoRA adapter, from which the pair is
// made over one copy of the weights. Which it is makes no difference to a host.
// Two ways to use it, both shown in examples/simple.c and its tests:
//
//   the pair      the host decodes every batch with adl_pair_decode and with llama_decode, then adl_pair_adjust changes the
//                 teacher's logits in place, before anything reads them. Any batch, any number of sequences.
//   the sampler   the host owns its loop over one sequence and puts adl_sampler_init's sampler first in its chain.
//
// Rules for every function:
//   - llama.cpp is reached only through the table of pointers that the host gives (struct adl_llama). The library links
//     no llama.cpp, so it works beside one that is linked statically, dynamically, or loaded by another language.
//   - What can fail returns ADL_OK (0) or more on success and an error code (< 0), or NULL, on failure. adl_last_error()
//     then says in words what was given, what was expected and what to do. Besides the codes that a function names, any
//     may return ADL_ERROR_INPUT or ADL_ERROR_MEMORY. No C++ exception leaves the library.
//   - It fails closed: where protection cannot be computed, a row is left in which end-of-generation has all the
//     probability and every other token the same logit, so that nothing of the teacher is left in it.
//   - Strings are UTF-8 and end in 0. Pointers that a function returns are the library's, unless a _free is named.
//   - One pair may be used by one thread at a time (samplers of one pair lock it among themselves); different pairs by
//     different threads. Contexts are created and freed one at a time.

#ifndef ADLOCAL_H
#define ADLOCAL_H

#include "adlocal-llama.h"
#include "llama.h" // types only

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(ADLOCAL_STATIC)
#    define ADL_API
#elif defined(_WIN32)
#    ifdef ADLOCAL_BUILD
#        define ADL_API __declspec(dllexport)
#    else
#        define ADL_API __declspec(dllimport)
#    endif
#else
#    define ADL_API __attribute__((visibility("default")))
#endif

// Of everything that returns a status, or NULL on failure: an error that is ignored is the one way to leak.
#if defined(__cplusplus) && __cplusplus >= 201703L
#    define ADL_NODISCARD [[nodiscard]]
#elif defined(__GNUC__)
#    define ADL_NODISCARD __attribute__((warn_unused_result))
#else
#    define ADL_NODISCARD
#endif

#ifdef __cplusplus
extern "C" {
#endif

//
// Errors
//

enum adl_status {
    ADL_OK               =  0,
    ADL_ERROR_INPUT      = -1, // an argument is out of its range
    ADL_ERROR_LLAMA      = -2, // the host's llama.cpp is not the one that this library was compiled for
    ADL_ERROR_BUNDLE     = -3, // a file is missing, unreadable or of another version, or the two do not fit together
    ADL_ERROR_MODEL      = -4, // llama.cpp refuses a file of the bundle, or a size that was asked for
    ADL_ERROR_VOCABULARY = -5, // teacher and proxy number their tokens differently
    ADL_ERROR_PROXY      = -6, // a proxy could not be evaluated or computes nonsense: nothing may be sampled
    ADL_ERROR_MEMORY     = -7, // an allocation failed
    ADL_ERROR_DECODE     = -8, // llama_decode of the teacher failed; adl_last_error has its code
};

// What went wrong in this thread's last failed call, "" before any. Valid until the thread's next failed call.
ADL_API const char * adl_last_error(void);

// Its code, ADL_OK before any. For functions that return NULL.
ADL_API int32_t adl_last_status(void);

// Version of this library, as "0.1.0". A binding refuses another version than its own.
ADL_API const char * adl_version(void);

//
// llama.cpp's functions
//

// The host's llama.cpp. Copied by what is made with it: it need not outlive the call.
struct adl_llama {
    size_t size; // sizeof(struct adl_llama)

#define ADL_LLAMA_SIZE(name) size_t sizeof_##name; // 0: the host cannot tell (a binding without that structure)
    ADL_LLAMA_STRUCTS(ADL_LLAMA_SIZE)
#undef ADL_LLAMA_SIZE

#define ADL_LLAMA_POINTER(result, name, arguments) result (*name) arguments;
    ADL_LLAMA_FUNCTIONS(ADL_LLAMA_POINTER)
#undef ADL_LLAMA_POINTER
};

// Initializer for hosts that link llama.cpp, statically or not:
//     struct adl_llama llama = ADL_LLAMA_LINKED;       (an automatic variable: Windows knows imported addresses at run time)
#define ADL_LLAMA_LINKED { sizeof(struct adl_llama), ADL_LLAMA_STRUCTS(ADL_LLAMA_SIZEOF_) ADL_LLAMA_FUNCTIONS(ADL_LLAMA_NAME_) }
#define ADL_LLAMA_SIZEOF_(name) sizeof(struct name),
#define ADL_LLAMA_NAME_(result, name, arguments) name,

// Name of the i-th structure or function of the table, in its order; NULL past the last. A binding fills the table by them.
ADL_API const char * adl_llama_struct_name  (size_t i);
ADL_API const char * adl_llama_function_name(size_t i);

// The handshake: does this library fit the host's llama.cpp? Compares version and sizes, and names a function that is
// missing. Everything that takes a table does it by itself.
// Returns ADL_OK or ADL_ERROR_LLAMA.
ADL_NODISCARD ADL_API int32_t adl_llama_check(const struct adl_llama * llama);

//
// Bundle
//

// What the metadata of a bundle's two files say.
struct adl_bundle {
    size_t   size; // sizeof(struct adl_bundle), to be set before it is read
    uint32_t format_version;
    bool     is_adapter;    // one proxy and ĝ as a LoRA adapter, instead of two halves
    char     id[65];        // hexadecimal
    double   epsilon;       // ε, the step along ĝ to either side, in units of the weights
    double   delta_scale;   // RMS of the centred Δ over plausible tokens, in nats: λ = strength / delta_scale
    double   gradient_norm; // ‖g‖
    double   guard;         // the guard at which delta_scale was measured, a sensible default
};

// Reads and validates the directory's two files, whichever format they are of: proxy-plus.gguf and proxy-minus.gguf, or
// proxy-base.gguf and proxy-adapter.gguf. No weights are read.
// Returns ADL_OK, ADL_ERROR_BUNDLE or ADL_ERROR_LLAMA. `out` is written on success only, and its size is to be set before:
//     struct adl_bundle bundle = {.size = sizeof bundle};
ADL_NODISCARD ADL_API int32_t adl_bundle_read(const struct adl_llama * llama, const char * dir, struct adl_bundle * out);

// Number of leading token ids that teacher and proxy share. Padding may make one of the vocabularies longer.
// Returns it, ADL_ERROR_VOCABULARY (naming the first id that differs) or ADL_ERROR_LLAMA.
ADL_NODISCARD ADL_API int32_t adl_vocab_shared(
        const struct adl_llama * llama, const struct llama_model * teacher, const struct llama_model * proxy);

//
// Pair
//

// Both proxies: two contexts, over two models or, made from an adapter, over one.
struct adl_pair;

// One of the two proxies: the one at θ − εĝ, which gives z₋, or the one at θ + εĝ, which gives z₊.
enum adl_sign {
    ADL_MINUS = -1,
    ADL_PLUS  =  1,
};

// Which threads evaluate the proxies. Either way no more threads run than the context parameters' n_threads: two at once
// get half of them each.
enum adl_concurrency {
    // In turns on a CPU, where together they take as long as one after the other; where layers are offloaded, the first
    // single-token batches are timed both ways, and at once is kept if it saves 5%.
    ADL_CONCURRENCY_AUTO  = 0,
    ADL_CONCURRENCY_TURNS = 1, // one after the other, on the caller's thread
    ADL_CONCURRENCY_BOTH  = 2, // at once, the second on a thread of the pair's own
};

struct adl_pair_params {
    size_t                      size;    // sizeof(struct adl_pair_params)
    struct llama_model_params   model;   // for each model
    struct llama_context_params context; // for each proxy: n_ctx at least the teacher's, n_batch and n_seq_max the teacher's;
                                         // flash_attn_type AUTO is off on a CPU, where a row would depend on its batch's length
    enum adl_concurrency        concurrency;
    double                      epsilon; // ε, in units of the weights, where an adapter is to be attached at another than the
                                         // bundle's; 0: the bundle's. Halves have the one that they were written with.
};

// size, and llama.cpp's defaults, but n_outputs_max = n_outputs_max_per_seq = 1 (rows of logits a batch may ask for: they size the
// compute buffer; with more sequences at least as many rows are taken), concurrency AUTO and the bundle's epsilon. `llama`
// must have passed adl_llama_check.
ADL_API struct adl_pair_params adl_pair_default_params(const struct adl_llama * llama);

// Opens a bundle of either format for a teacher: reads, validates, loads it and compares the vocabularies.
// The teacher's model is read during the call only. Free with adl_pair_free, after the samplers made of it.
// Returns NULL on failure.
ADL_NODISCARD ADL_API struct adl_pair * adl_pair_init(
        const struct adl_llama * llama, const char * dir, const struct llama_model * teacher, struct adl_pair_params params);

// Loads two files as halves, whatever their metadata say; for tools that make bundles or have validated them.
// teacher == NULL: the pair decodes and gives logits and doses, but adjusts nothing, and delta_scale may be 0 (unknown).
// Returns NULL on failure.
ADL_NODISCARD ADL_API struct adl_pair * adl_pair_init_from_files(
        const struct adl_llama * llama, const char * path_plus, const char * path_minus, double epsilon, double delta_scale,
        const struct llama_model * teacher, struct adl_pair_params params);

// Loads a model once and attaches a LoRA adapter of ĝ to two contexts over it, at +ε and −ε, whatever the files' metadata
// say; alpha is to be 0 in the adapter, so that llama.cpp takes a scale as it is. `epsilon` is the bundle's; params.epsilon
// goes before it. Else as adl_pair_init_from_files.
// Returns NULL on failure.
ADL_NODISCARD ADL_API struct adl_pair * adl_pair_init_from_adapter(
        const struct adl_llama * llama, const char * path_base, const char * path_adapter, double epsilon, double delta_scale,
        const struct llama_model * teacher, struct adl_pair_params params);

// Another pair over the weights of one, for another context of the teacher's, or for another teacher. params.model is not
// used. Either may be freed first.
// Returns NULL on failure.
ADL_NODISCARD ADL_API struct adl_pair * adl_pair_init_from_pair(
        const struct adl_pair * pair, const struct llama_model * teacher, struct adl_pair_params params);

// Frees contexts, and models and adapter with the last pair over them. NULL is fine.
ADL_API void adl_pair_free(struct adl_pair * pair);

ADL_API uint32_t adl_pair_n_ctx   (const struct adl_pair * pair); // of each proxy, as llama.cpp rounded it
ADL_API int32_t  adl_pair_n_vocab (const struct adl_pair * pair); // of the proxies
ADL_API int32_t  adl_pair_n_shared(const struct adl_pair * pair); // leading ids shared with the teacher, 0 without one

// ε in force, in units of the weights: Δ = (z₊ − z₋) / 2ε.
ADL_API double adl_pair_epsilon(const struct adl_pair * pair);

// Attaches the adapter at another ε. Both memories are cleared and rows are dropped; a sampler's position that is evaluated
// already stays as it is. delta_scale stays too: it hardly changes within the linear range of ε.
// Returns ADL_OK, ADL_ERROR_INPUT (ε no positive number, or a pair of halves: nothing is changed), or ADL_ERROR_PROXY where
// llama.cpp refuses; then the pair keeps its ε, and adl_pair_decode attaches the adapter at it again or fails.
ADL_NODISCARD ADL_API int32_t adl_pair_set_epsilon(struct adl_pair * pair, double epsilon);

// One proxy, for reading: performance counters, saved states. Decoding in it parts the pair; a state set in
// both is to be followed by adl_pair_touch. One model serves both signs where the pair was made from an adapter.
ADL_API struct llama_context * adl_pair_get_context(const struct adl_pair * pair, enum adl_sign sign);
ADL_API struct llama_model *   adl_pair_get_model  (const struct adl_pair * pair, enum adl_sign sign);

// Evaluates a batch in both proxies, as llama_decode: same tokens, positions, sequences and output flags as the teacher's.
// Embeddings instead of tokens are refused.
// Returns the number of output rows, or an error. An error sticks: until adl_pair_memory_clear the pair refuses to go on,
// because its memory no longer is the teacher's.
ADL_NODISCARD ADL_API int32_t adl_pair_decode(struct adl_pair * pair, struct llama_batch batch);

// The sticky error in words, NULL if there is none. Valid until the next call that changes the pair.
ADL_API const char * adl_pair_error(const struct adl_pair * pair);

// One proxy's logits of the last decode's output rows in the order of the batch, n_rows × adl_pair_n_vocab.
// NULL if there are none. Valid until the next decode.
ADL_API const float * adl_pair_get_logits(struct adl_pair * pair, enum adl_sign sign);

// The memory operations of llama.h, on both proxies. They leave no rows to adjust.
// seq_rm returns false where the memory cannot forget a part: clear the sequence then, and decode it afresh. Recurrent models
// have a state. Sliding windows that share their cells with other sequences lose what they have passed, swa_full or not.
ADL_API void adl_pair_memory_clear   (struct adl_pair * pair);
ADL_API bool adl_pair_memory_seq_rm  (struct adl_pair * pair, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
ADL_API void adl_pair_memory_seq_cp  (struct adl_pair * pair, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
ADL_API void adl_pair_memory_seq_keep(struct adl_pair * pair, llama_seq_id seq_id);

// Rows of logits of the last decode; 0 where the memory was changed since.
ADL_API int32_t adl_pair_n_rows(const struct adl_pair * pair);

// A number that changes whenever the pair's memory does, whoever changed it.
ADL_API uint64_t adl_pair_serial(const struct adl_pair * pair);

// Says that the host has replaced both memories (llama_state_set_data): rows and what samplers know of them are dropped.
ADL_API void adl_pair_touch(struct adl_pair * pair);

//
// Adjustment
//

// By-products of adjusting one row.
struct adl_row {
    double  mean;         // E[Δ] under the proxy, softmax((z₊ + z₋) / 2); the dose of a token is Δ(token) − mean
    double  kl;           // KL(adjusted ‖ teacher) at temperature 1, in nats
    int32_t n_candidates; // tokens that passed the guard, ends not counted
};

// Adjusts one row of the teacher's logits in place: candidates become z + λΔ + c, with the c that keeps their total mass, so
// that at temperature 1 all other tokens keep their probability. Ends of generation are no candidates. Where an end would
// become the largest logit and was not, one candidate is set to the next float above it, and the others pay for that.
//   logits        (n_vocab) the teacher's
//   plus, minus   (n_proxy) the proxies'
//   n_shared      only ids below it are lifted; at most n_vocab and n_proxy
//   ends          (n_ends) ids below n_vocab that end generation; NULL if there are none
//   lam           λ, in logits a unit of Δ; 0 leaves the row as it is, to the bit
//   guard         share of the top token's probability that a candidate needs, 0 (every token) to 1; the top may be an end
// Returns ADL_OK, ADL_ERROR_INPUT or ADL_ERROR_PROXY (a NaN or infinity where none may be). On an error neither the row nor
// `out` is changed. Safe to call from any thread.
ADL_NODISCARD ADL_API int32_t adl_adjust(
        float * logits, int32_t n_vocab, const float * plus, const float * minus, int32_t n_proxy, int32_t n_shared,
        const llama_token * ends, size_t n_ends, double epsilon, double lam, double guard, struct adl_row * out);

// Adjusts the teacher's rows of the batch that adl_pair_decode evaluated last, in place.
//   logits     (n_rows × n_vocab of the teacher) llama_get_logits(teacher)
//   n_rows     what adl_pair_decode returned
//   strength   (n_rows) typical shift of a plausible token's logit, in nats, for each row; 0 leaves a row as it is
//   guard      (n_rows) share of the top token's probability that a candidate needs, 0 to 1, for each row
//   rows       (n_rows) written on success
// Returns ADL_OK or an error. On an error every row is closed: the teacher's end-of-generation tokens are all that can be
// sampled. (A pair that was made without a teacher cannot know their number, and leaves the rows alone.)
ADL_NODISCARD ADL_API int32_t adl_pair_adjust(
        struct adl_pair * pair, float * logits, int32_t n_rows, const double * strength, const double * guard,
        struct adl_row * rows);

// Δ(token) − E[Δ] of a token for a row of the last decode, adjusted or not. Summed over a text it is the text's dose: to
// first order, how much a training step on it raises the proxy's loss. 0 for a token beyond the proxy's vocabulary, NaN if
// the row is not there.
ADL_API double adl_pair_dose(struct adl_pair * pair, int32_t row, llama_token token);

//
// Lockstep
//

// The protected step. The teacher decodes first. Where one of its tokens alone passes the guard there is nothing to steer,
// and the row stays the teacher's, to the bit. Only where a row has a choice is the pair evaluated: until then tokens wait,
// and all that wait of a sequence are decoded together: in one batch a prompt, and in one batch what was sampled after it. Then
// the row is adjusted in place.
//
// On a CPU a row depends on the batch that it was evaluated in. So that a prompt that is cached gives the rows of a fresh one, a
// host decodes all of a prompt but its last token without rows, and then the last one by itself, for its row; and what it keeps
// of another prompt it cuts at a multiple of 32 tokens. The pair's batches are then those of a fresh prompt as well: tokens
// that come alone and with a row were sampled, or are a prompt's last, and all others are of prompts.
//
//     if (adl_lockstep_decode(lockstep, batch, rows, n_rows, results) != ADL_OK) { ... }
//
// in place of llama_decode, or around it:
//
//     if (adl_lockstep_begin(lockstep, batch, rows, n_rows) != ADL_OK) { ... }      the teacher must not decode
//     status = llama_decode(teacher, batch);
//     if (adl_lockstep_end(lockstep, status, results) != ADL_OK) { ... }            whatever the status is
//
// From then on the teacher's memory is changed through the lockstep alone: it has to know which tokens are there.
//
// It fails closed, row by row: a row whose Δ could not be computed is closed, the others go on, and the lockstep heals by
// evaluating the pair afresh. After a teacher's decode that failed, its rows are closed until the next one succeeds, and
// what it left of the batch in the teacher's memory is removed.
struct adl_lockstep;

enum adl_mode {
    ADL_MODE_OFF     = 0, // the row is the teacher's
    ADL_MODE_OBSERVE = 1, // where it has a choice the pair is evaluated, for doses; nothing is changed
    ADL_MODE_PROTECT = 2, // and the row is adjusted; at strength 0 as OFF
};

// What becomes of one output row.
struct adl_row_params {
    double  strength; // nats
    double  guard;    // share of the top token's probability, 0 to 1
    int32_t mode;     // enum adl_mode
    bool    full;     // evaluate the pair for this row even where the teacher has no choice, for its dose
};

// What became of it.
struct adl_row_result {
    double  kl;           // KL(adjusted ‖ teacher) at temperature 1, nats
    int32_t n_candidates; // tokens that passed the guard; 0 for a row that was neither observed nor protected
    bool    evaluated;    // the pair was evaluated: the row has doses
    bool    closed;       // Δ could not be computed: end-of-generation is all that can be sampled
};

struct adl_lockstep_params {
    size_t size; // sizeof(struct adl_lockstep_params)
    bool   full; // evaluate the pair for every row that is observed or protected, as row parameters may ask one by one
};

// What was done since the lockstep was made.
struct adl_lockstep_stats {
    int64_t n_rows;         // output rows
    int64_t n_choices;      // of those observed or protected, the ones where at least two tokens passed the guard
    int64_t n_evaluated;    // rows whose Δ was computed
    int64_t n_pair_decodes; // batches of the pair
    int64_t n_pair_tokens;  // tokens in them
};

// Defaults: size, and lazy.
ADL_API struct adl_lockstep_params adl_lockstep_default_params(void);

// A lockstep of a teacher's context and a pair that was made for its model. Both must outlive it, and both memories are to
// be empty; the pair's is cleared. The pair's sequences share their cells where its context parameters say kv_unified,
// as adl_pair_default_params do: those with a choice are any subset, which llama.cpp joins in unified memory only.
// Returns NULL on failure.
ADL_NODISCARD ADL_API struct adl_lockstep * adl_lockstep_init(
        struct adl_pair * pair, struct llama_context * teacher, struct adl_lockstep_params params);

ADL_API void adl_lockstep_free(struct adl_lockstep * lockstep); // NULL is fine

// Says what the host is about to decode in the teacher. Everything is copied. Positions, sequences and outputs that are NULL
// are what llama_decode takes them for. `rows` has one entry for each output row, in the order of the batch.
// Returns ADL_OK, ADL_ERROR_INPUT, or ADL_ERROR_PROXY: a batch of embeddings, or the teacher's memory was changed around the
// lockstep. On an error the host must not decode.
ADL_NODISCARD ADL_API int32_t adl_lockstep_begin(
        struct adl_lockstep * lockstep, struct llama_batch batch, const struct adl_row_params * rows, int32_t n_rows);

// Says how the teacher's decode ended, `status` being what llama_decode returned, and adjusts its rows.
// `results` (n_rows) may be NULL.
// Returns ADL_OK, also after a teacher's decode that failed; or the error of the first row that was closed.
ADL_NODISCARD ADL_API int32_t adl_lockstep_end(struct adl_lockstep * lockstep, int32_t status, struct adl_row_result * results);

// Begin, llama_decode of the teacher, and end.
// Returns what llama_decode returned where that is not 0 (1: no room, and 2, as in llama.h; its own negative codes as
// ADL_ERROR_DECODE), else what adl_lockstep_end returns.
ADL_NODISCARD ADL_API int32_t adl_lockstep_decode(
        struct adl_lockstep * lockstep, struct llama_batch batch, const struct adl_row_params * rows, int32_t n_rows,
        struct adl_row_result * results);

// Δ(token) − E[Δ] of a token for a row of the last step; as adl_pair_dose. NaN for a row whose Δ was not computed.
ADL_API double adl_lockstep_dose(const struct adl_lockstep * lockstep, int32_t row, llama_token token);

// Doses of all tokens that a sequence has from position `pos` on, into `doses` (n_tokens). All but the last have to be
// decoded; a token comes before them. The pair evaluates them afresh, in batches of as many rows as it was made for:
// for a trace that is finished, that is one prefill. The last step's rows have no doses after it.
// Returns ADL_OK; ADL_ERROR_INPUT, and nothing is evaluated; ADL_ERROR_PROXY or ADL_ERROR_MEMORY: `doses` is of no use then.
ADL_NODISCARD ADL_API int32_t adl_lockstep_doses(
        struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_pos pos, const llama_token * tokens, size_t n_tokens,
        double * doses);

// z₊ or z₋ of a row of the last step, adl_pair_n_vocab numbers. NULL where the pair was not evaluated for it. Valid until the
// next begin, memory_clear or restore.
ADL_API const float * adl_lockstep_get_logits(const struct adl_lockstep * lockstep, int32_t row, enum adl_sign sign);

ADL_API struct adl_lockstep_stats adl_lockstep_get_stats(const struct adl_lockstep * lockstep);

// The memory operations of llama.h, on the teacher and, where it holds those tokens, on the pair.
// seq_rm returns what the teacher's memory says: false where it cannot forget a part.
ADL_API void adl_lockstep_memory_clear   (struct adl_lockstep * lockstep);
ADL_API bool adl_lockstep_memory_seq_rm  (struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
ADL_NODISCARD ADL_API int32_t adl_lockstep_memory_seq_cp(
        struct adl_lockstep * lockstep, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
ADL_API void adl_lockstep_memory_seq_keep(struct adl_lockstep * lockstep, llama_seq_id seq_id);

// Closes the first `n_rows` rows of the teacher's logits: end-of-generation is all that can be sampled from them. For hosts
// that had the teacher decode with outputs that the lockstep was not told of.
ADL_API void adl_lockstep_close(const struct adl_lockstep * lockstep, int32_t n_rows);

// The tokens that the teacher's memory holds of a sequence, and their positions: as many as `capacity` allows.
// Returns how many there are.
ADL_API size_t adl_lockstep_get_tokens(
        const struct adl_lockstep * lockstep, llama_seq_id seq_id, llama_token * tokens, llama_pos * pos, size_t capacity);

// How many of a sequence's tokens the pair holds; the others wait.
ADL_API size_t adl_lockstep_n_held(const struct adl_lockstep * lockstep, llama_seq_id seq_id);

// Says that the host has restored a saved state of the teacher: the sequence now holds these tokens at these positions, which
// rise; NULL: from position 0 on. The
// pair's memory holds the first `n_held` of them and nothing else, where the host restored that too (and said so with
// adl_pair_touch); the others are evaluated when they are needed, as if all but the last were of a prompt.
ADL_NODISCARD ADL_API int32_t adl_lockstep_restore(
        struct adl_lockstep * lockstep, llama_seq_id seq_id, const llama_token * tokens, const llama_pos * pos, size_t n_tokens,
        size_t n_held);

//
// Sampler
//

// A llama_sampler that evaluates the pair and adjusts the candidates' logits, for hosts that own their loop over one
// sequence:
//
//     struct llama_sampler * smpl = adl_sampler_init(pair, 1.0, 0.05);
//     if (smpl == NULL || adl_sampler_set_prefix(smpl, prompt, n_prompt) != ADL_OK) { ... }
//     llama_sampler_chain_add(chain, smpl);                       first, before samplers that drop candidates
//     ... llama_decode(teacher, ...); token = llama_sampler_sample(chain, teacher, -1); ...
//
// Where at least two of the candidates that are left pass the guard, it evaluates the proxies on the prefix and the accepted
// tokens, and adjusts. Where at most one does, the candidates stay as they are, to the bit, and the tokens wait: they are
// decoded together when a position has a choice, those of the prompt but the last in a batch of their own (see the lockstep:
// a host decodes them so, too). It evaluates once a position: applied again without an accept (grammar
// resampling) it uses what it has. Candidates are told by their id, so others may have been dropped or sorted before; the
// guard and the kept mass are then those of what is left. At strength 0 it evaluates for the dose, and changes nothing.
//
// Fails closed: when the pair cannot be evaluated where it is needed, end-of-generation has all the probability, and every
// other token that is left the same tiny one. So it has, choice or none, without a prefix, where the teacher's logits are not
// numbers, and where a candidate is none of the teacher's tokens. Where something rules end-of-generation out (a grammar that
// is not at its end, a bias) or prefers unlikely tokens (adaptive-p, XTC at threshold 0), what is sampled owes nothing to the
// teacher. Ask adl_sampler_error before showing a token. Put truncations after this sampler and after the grammar: together
// with a grammar, one before them may leave end-of-generation alone, and llama.cpp ends the process when a grammar has to
// accept a token that it forbids.
//
// Ownership is llama.cpp's: a chain frees what was added to it, otherwise llama_sampler_free does. The pair must outlive it.
//
// Returns NULL on failure: strength not finite or negative, guard not within 0 and 1, a pair without teacher.
ADL_NODISCARD ADL_API struct llama_sampler * adl_sampler_init(struct adl_pair * pair, double strength, double guard);

// The tokens of the teacher's context so far, prompt and all. Forgets what was accepted, and an error. Tokens that the host
// passes to llama_sampler_accept (llama_sampler_sample does) are appended: a host that accepts its prompt needs no prefix.
// Returns ADL_OK, or ADL_ERROR_INPUT if `smpl` is no sampler of adlocal's. On an error a sampler of ours stays closed.
ADL_NODISCARD ADL_API int32_t adl_sampler_set_prefix(struct llama_sampler * smpl, const llama_token * tokens, size_t n_tokens);

// The sticky error in words, NULL if there is none. llama_sampler_reset and set_prefix clear it.
ADL_API const char * adl_sampler_error(const struct llama_sampler * smpl);

// What protection did since the last reset or set_prefix.
struct adl_dose {
    int64_t n_tokens;    // tokens accepted after the sampler was applied at their position
    int64_t n_steerable; // those where at least two tokens passed the guard
    int64_t n_dosed;     // those whose Δ was computed: where there was a choice, in any application at their position
    double  total;       // Σ (Δ(x) − E[Δ]) over the n_dosed
    double  kl;          // Σ KL(adjusted ‖ teacher) over the n_tokens, nats
};
ADL_API struct adl_dose adl_sampler_get_dose(const struct llama_sampler * smpl);

#ifdef __cplusplus
}
#endif

#endif // ADLOCAL_H
