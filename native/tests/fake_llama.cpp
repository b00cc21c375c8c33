#include "fake_llama.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

using fake::Counts;
using fake::File;
using fake::Settings;
using fake::Value;

// One token in a memory, of one or more sequences.
struct Cell {
    llama_pos              pos;
    llama_token            token;
    std::set<llama_seq_id> seqs;
    std::set<llama_seq_id> lost = {}; // those of them whose sliding window no longer has it; see File::n_swa
};

struct llama_vocab {
    fake::Vocab of;
};

struct llama_adapter_lora {
    std::string path;
};

struct llama_model {
    std::string        path;
    llama_model_params params;
    llama_vocab        vocab;
    std::atomic<int>   n_contexts{0};
    std::vector<std::unique_ptr<llama_adapter_lora>> adapters;
};

struct llama_memory_i {
    llama_context * ctx;
};

struct llama_context {
    llama_model *        model;
    llama_context_params params;
    llama_memory_i       memory;
    std::vector<Cell>    cells;
    std::vector<float>   rows;
    int                  n_threads, n_threads_batch;
    std::atomic<int>     n_decodes{0}, n_synchronizes{0};
    std::vector<int32_t> batches = {};
    std::atomic<bool>    in_use{false};
    std::string          adapter = ""; // its path, "" if none is attached
    float                scale = 0;
};

struct gguf_context {
    std::vector<std::pair<std::string, Value>> keys;
    std::vector<fake::Tensor>                  tensors;
};

namespace {

// State of the toy, behind one mutex.
struct State {
    std::map<std::string, File> files;
    Settings                    settings;
    Counts                      counts;
    std::string                 violations;
    int                         lifecycle = 0; // contexts that are being made or freed
    int                         decoding = 0, threads = 0, threads_batch = 0; // of the decodes at work
    uint64_t                    n_started = 0; // decodes
};

State &                 state() { static State s; return s; }
std::mutex              state_mutex;
std::condition_variable state_changed;
std::mutex              queue; // Settings::one_queue
thread_local int        depth = 0;

// In every function of the toy that allocates.
struct Inside {
    Inside() { ++depth; }
    ~Inside() { --depth; }
};

void violate(const std::string & what) {
    std::lock_guard<std::mutex> lock(state_mutex);
    state().violations += what + "\n";
}

// llama.cpp's contexts are for one thread at a time.
struct Use {
    explicit Use(const llama_context * ctx) : in_use(const_cast<llama_context *>(ctx)->in_use) {
        if (in_use.exchange(true)) {
            violate("a context is used by two threads at once");
        }
    }
    ~Use() { in_use = false; }
    std::atomic<bool> & in_use;
};

void add_count(int Counts::*member, int n) {
    std::lock_guard<std::mutex> lock(state_mutex);
    state().counts.*member += n;
}

File file_of(const std::string & path) {
    std::lock_guard<std::mutex> lock(state_mutex);
    const auto found = state().files.find(path);
    return found == state().files.end() ? File{} : found->second;
}

// Makes and frees of contexts, and how many there are at once.
struct Lifecycle {
    Lifecycle() {
        std::unique_lock<std::mutex> lock(state_mutex);
        Counts & c = state().counts;
        c.max_lifecycle_together = std::max(c.max_lifecycle_together, ++state().lifecycle);
        const auto time = state().settings.lifecycle_time;
        lock.unlock();
        std::this_thread::sleep_for(time);
    }
    ~Lifecycle() {
        std::lock_guard<std::mutex> lock(state_mutex);
        --state().lifecycle;
    }
};

//
// Logits
//

uint64_t mix(uint64_t x) { // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

float uniform(uint64_t x) { // −1 to 1
    return static_cast<float>(static_cast<double>(mix(x) >> 11) / (1ull << 52) - 1.0);
}

using History = std::vector<std::pair<llama_pos, llama_token>>;

// The model with the adapter's part in place of its own.
File moved(File model, const std::string & adapter, float scale) {
    if (!adapter.empty()) {
        const File f    = file_of(adapter);
        model.own_seed  = f.own_seed;
        model.own_scale = scale * f.own_scale;
    }
    return model;
}

std::vector<float> logits_of(const File & f, const History & history) {
    uint64_t h = 0;
    for (const auto & [pos, token] : history) {
        h = mix(h ^ mix(static_cast<uint64_t>(pos) << 32 | static_cast<uint32_t>(token)));
    }
    std::vector<float> z(f.vocab.texts.size());
    for (size_t i = 0; i < z.size(); ++i) {
        const uint64_t at = mix(h ^ (i + 1));
        z[i]              = 4.0f * uniform(at ^ mix(f.seed)) + f.own_scale * uniform(at ^ mix(mix(f.own_seed)));
    }
    for (const auto & [token, value] : f.faults.logits) {
        z[token] = value;
    }
    return z;
}

History history_of(const llama_context * ctx, llama_seq_id seq_id, llama_pos end) {
    const int32_t n_swa = file_of(ctx->model->path).n_swa;
    History       history;
    for (const Cell & cell : ctx->cells) {
        const bool missed = cell.lost.count(seq_id) && end - 1 - cell.pos < n_swa;
        if (cell.seqs.count(seq_id) && cell.pos < end && !missed) {
            history.push_back({cell.pos, cell.token});
        }
    }
    std::sort(history.begin(), history.end());
    return history;
}

//
// Batches
//

struct Entry {
    Cell cell;
    bool output;
};

// The next position of a sequence, by the memory and the batch's entries so far.
llama_pos next_position(const llama_context * ctx, const std::vector<Entry> & before, llama_seq_id seq_id) {
    llama_pos next = 0;
    for (const Cell & cell : ctx->cells) {
        next = cell.seqs.count(seq_id) ? std::max(next, cell.pos + 1) : next;
    }
    for (const Entry & entry : before) {
        next = entry.cell.seqs.count(seq_id) ? std::max(next, entry.cell.pos + 1) : next;
    }
    return next;
}

// As if other tokens had taken the cells that a window has left behind. A sequence loses all that came before them, too.
void lose(llama_context * ctx) {
    const int32_t                     n_swa = file_of(ctx->model->path).n_swa;
    std::map<llama_seq_id, llama_pos> last;
    for (const Cell & cell : ctx->cells) {
        for (const llama_seq_id s : cell.seqs) {
            const bool is_alone = cell.seqs.size() == cell.lost.size() + 1 && !cell.lost.count(s);
            if (n_swa > 0 && is_alone && next_position(ctx, {}, s) - cell.pos >= n_swa) {
                last[s] = std::max(last[s], cell.pos);
            }
        }
    }
    for (const auto & [s, pos] : last) {
        for (Cell & cell : ctx->cells) {
            if (cell.seqs.count(s) && cell.pos <= pos) {
                cell.lost.insert(s);
            }
        }
    }
}

bool is_empty(const llama_context * ctx, const std::vector<Entry> & before, llama_seq_id seq_id) {
    const auto has = [&](const Cell & cell) { return cell.seqs.count(seq_id) > 0; };
    return std::none_of(ctx->cells.begin(), ctx->cells.end(), has) &&
           std::none_of(before.begin(), before.end(), [&](const Entry & entry) { return has(entry.cell); });
}

// A batch as llama.h documents it, NULL members and all. False if llama_decode refuses it with −1.
bool read_batch(const llama_context * ctx, const llama_batch & batch, std::vector<Entry> & entries) {
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        Cell cell = {0, batch.token[i], {}};
        for (int32_t j = 0; j < (batch.n_seq_id && batch.seq_id ? batch.n_seq_id[i] : 1); ++j) {
            cell.seqs.insert(batch.seq_id ? batch.seq_id[i][j] : 0);
        }
        const llama_seq_id seq_id = *cell.seqs.begin();
        cell.pos                  = batch.pos ? batch.pos[i] : next_position(ctx, entries, seq_id);
        if (cell.token < 0 || cell.token >= static_cast<int32_t>(ctx->model->vocab.of.texts.size()) || cell.pos < 0 || seq_id < 0 ||
            *cell.seqs.rbegin() >= static_cast<llama_seq_id>(ctx->params.n_seq_max)) {
            return false;
        }
        for (llama_seq_id s : cell.seqs) { // a sequence may begin anywhere, but has no holes
            if (!is_empty(ctx, entries, s) && cell.pos != next_position(ctx, entries, s)) {
                return false;
            }
        }
        entries.push_back({cell, batch.logits ? batch.logits[i] != 0 : i == batch.n_tokens - 1});
    }
    return batch.n_tokens > 0;
}

// What the real one asserts.
bool fits(const llama_context * ctx, const llama_batch & batch, const std::vector<Entry> & entries) {
    const auto n_outputs = static_cast<uint32_t>(std::count_if(entries.begin(), entries.end(), [](const Entry & e) { return e.output; }));
    if (batch.n_tokens > static_cast<int32_t>(ctx->params.n_batch)) {
        violate("llama_decode: n_tokens_all <= cparams.n_batch");
        return false;
    }
    if (n_outputs > ctx->params.n_outputs_max) {
        violate("llama_decode: n_outputs_max <= cparams.n_outputs_max");
        return false;
    }
    return true;
}

int32_t evaluate(llama_context * ctx, const llama_batch & batch, int32_t planned) {
    std::vector<Entry> entries; // as in the real one, a batch that is refused leaves the rows of the last one readable
    const bool refused = batch.token == nullptr || !read_batch(ctx, batch, entries);
    if (!refused && !fits(ctx, batch, entries)) {
        return -3;
    }
    if (refused || planned == -1) {
        return -1;
    }
    if (planned == -2) {
        return -2;
    }
    if (planned == 1 || ctx->cells.size() + entries.size() > ctx->params.n_ctx) {
        return 1;
    }
    const auto n_rows = std::count_if(entries.begin(), entries.end(), [](const Entry & entry) { return entry.output; });
    if (planned != 0) {
        entries.resize(entries.size() / 2); // what had been processed stays, and its rows are readable
    }
    const File         file = moved(file_of(ctx->model->path), ctx->adapter, ctx->scale);
    std::vector<float> rows;
    for (const Entry & entry : entries) {
        ctx->cells.push_back(entry.cell);
        if (entry.output) {
            const std::vector<float> z = logits_of(file, history_of(ctx, *entry.cell.seqs.begin(), entry.cell.pos + 1));
            rows.insert(rows.end(), z.begin(), z.end());
        }
    }
    rows.resize(static_cast<size_t>(n_rows) * file.vocab.texts.size());
    if (planned != 0 && rows.size() < ctx->rows.size()) { // the buffer does not shrink
        rows.insert(rows.end(), ctx->rows.begin() + static_cast<std::ptrdiff_t>(rows.size()), ctx->rows.end());
    }
    lose(ctx);
    ctx->rows = std::vector<float>(rows.begin(), rows.end()); // to the size: reading beyond it is found
    return planned;
}

// Counts what is at work, and waits as the settings say.
struct Decode {
    Decode(llama_context * ctx, int32_t n_tokens) : ctx_(ctx), batch_(n_tokens > 1) {
        std::unique_lock<std::mutex> lock(state_mutex);
        State & s = state();
        ++s.counts.decodes;
        s.counts.decode_threads.insert(std::this_thread::get_id());
        s.counts.max_together      = std::max(s.counts.max_together, ++s.decoding);
        s.threads += batch_ ? 0 : ctx->n_threads;
        s.threads_batch += batch_ ? ctx->n_threads_batch : 0;
        s.counts.max_threads       = std::max(s.counts.max_threads, s.threads);
        s.counts.max_threads_batch = std::max(s.counts.max_threads_batch, s.threads_batch);
        const uint64_t mine = s.n_started++ / 2;
        state_changed.notify_all();
        if (s.settings.rendezvous) { // decodes meet in pairs, the first with the second
            state_changed.wait_for(lock, std::chrono::seconds(5), [&] { return s.n_started >= 2 * (mine + 1); });
        }
    }

    ~Decode() {
        std::lock_guard<std::mutex> lock(state_mutex);
        State & s = state();
        --s.decoding;
        s.threads -= batch_ ? 0 : ctx_->n_threads;
        s.threads_batch -= batch_ ? ctx_->n_threads_batch : 0;
    }

  private:
    llama_context * const ctx_;
    const bool            batch_;
};

void take_time() {
    const Settings settings = fake::settings();
    if (!settings.one_queue) {
        std::this_thread::sleep_for(settings.decode_time);
        return;
    }
    std::unique_lock<std::mutex> lock(queue, std::try_to_lock);
    const bool                   waited = !lock.owns_lock();
    if (waited) {
        lock.lock();
    }
    std::this_thread::sleep_for(waited ? settings.decode_time * 3 / 2 : settings.decode_time);
}

// The code that a fault plans for this call, 0 if none. Throws if that is planned.
int32_t planned_fault(const std::string & path) {
    std::lock_guard<std::mutex> lock(state_mutex);
    const auto                  found = state().files.find(path);
    if (found == state().files.end() || found->second.faults.decode_in == 0 || --found->second.faults.decode_in > 0) {
        return 0;
    }
    switch (found->second.faults.throws) {
        case fake::Throws::EXCEPTION: throw std::runtime_error("the toy's backend is gone");
        case fake::Throws::NUMBER:    throw 42;
        default:                      return found->second.faults.decode_code;
    }
}

llama_token role(const llama_vocab * vocab, const char * name) {
    const auto found = vocab->of.roles.find(name);
    return found == vocab->of.roles.end() ? LLAMA_TOKEN_NULL : found->second;
}

Value number(gguf_type type, const void * data, size_t size) {
    const auto * bytes = static_cast<const uint8_t *>(data);
    return {type, GGUF_TYPE_COUNT, {bytes, bytes + size}, {}};
}

const Value & value_at(const gguf_context * ctx, int64_t key) {
    static const Value none;
    if (key < 0 || key >= static_cast<int64_t>(ctx->keys.size())) {
        violate("gguf: key_id >= 0 && key_id < gguf_get_n_kv(ctx)");
        return none;
    }
    return ctx->keys[key].second;
}

const Value & expect(const Value & value, bool holds, const char * what) {
    if (!holds) {
        violate(what);
    }
    return value;
}

} // namespace

namespace fake {

Value u32(uint32_t value) { return number(GGUF_TYPE_UINT32, &value, sizeof value); }
Value i32(int32_t value) { return number(GGUF_TYPE_INT32, &value, sizeof value); }
Value u64(uint64_t value) { return number(GGUF_TYPE_UINT64, &value, sizeof value); }
Value f32(float value) { return number(GGUF_TYPE_FLOAT32, &value, sizeof value); }
Value f64(double value) { return number(GGUF_TYPE_FLOAT64, &value, sizeof value); }
Value boolean(bool value) { return number(GGUF_TYPE_BOOL, &value, sizeof value); }
Value text(std::string value) { return {GGUF_TYPE_STRING, GGUF_TYPE_COUNT, {}, {std::move(value)}}; }
Value texts(std::vector<std::string> values) { return {GGUF_TYPE_ARRAY, GGUF_TYPE_STRING, {}, std::move(values)}; }

Value f64s(const std::vector<double> & values) {
    Value value   = number(GGUF_TYPE_ARRAY, values.data(), values.size() * sizeof(double));
    value.element = GGUF_TYPE_FLOAT64;
    return value;
}

Value u32s(const std::vector<uint32_t> & values) {
    Value value   = number(GGUF_TYPE_ARRAY, values.data(), values.size() * sizeof(uint32_t));
    value.element = GGUF_TYPE_UINT32;
    return value;
}

File & file(const std::string & path) { return state().files[path]; }
void   remove_file(const std::string & path) { state().files.erase(path); }
Counts & counts() { return state().counts; }

Settings & settings() { return state().settings; }

void reset() {
    const Counts alive = state().counts;
    state()            = State{};
    Counts & c         = state().counts;
    c.models = alive.models, c.contexts = alive.contexts, c.adapters = alive.adapters, c.ggufs = alive.ggufs, c.samplers = alive.samplers;
}

std::string violations() {
    std::lock_guard<std::mutex> lock(state_mutex);
    return state().violations;
}

static History history_from(const std::vector<llama_token> & tokens) {
    History history;
    for (size_t i = 0; i < tokens.size(); ++i) {
        history.push_back({static_cast<llama_pos>(i), tokens[i]});
    }
    return history;
}

std::vector<float> logits(const std::string & path, const std::vector<llama_token> & tokens) {
    return logits_of(file_of(path), history_from(tokens));
}

std::vector<float> logits(const std::string & path, const std::string & adapter, float scale, const std::vector<llama_token> & tokens) {
    return logits_of(moved(file_of(path), adapter, scale), history_from(tokens));
}

std::vector<std::pair<llama_pos, llama_token>> memory(const llama_context * ctx, llama_seq_id seq_id) {
    return history_of(ctx, seq_id, INT32_MAX);
}

int                  n_decodes(const llama_context * ctx) { return ctx->n_decodes; }
std::vector<int32_t> batches(const llama_context * ctx) { return ctx->batches; }
int                  n_synchronizes(const llama_context * ctx) { return ctx->n_synchronizes; }
int                  n_threads(const llama_context * ctx) { return ctx->n_threads; }
int                  n_threads_batch(const llama_context * ctx) { return ctx->n_threads_batch; }
llama_context_params context_params(const llama_context * ctx) { return ctx->params; }
llama_model_params   model_params(const llama_model * model) { return model->params; }
float                scale(const llama_context * ctx) { return ctx->scale; }
bool                 inside() { return depth > 0; }

} // namespace fake

adl_llama fake_llama_table() {
    adl_llama llama = ADL_LLAMA_LINKED;
    return llama;
}

//
// llama.h: models and contexts
//

const char * llama_version(void) { return fake::settings().version; }
bool         llama_supports_gpu_offload(void) { return fake::settings().supports_offload; }

llama_model_params llama_model_default_params(void) {
    llama_model_params params = {};
    params.n_gpu_layers       = -1; // as in the real one: all
    return params;
}

llama_context_params llama_context_default_params(void) {
    llama_context_params params  = {};
    params.n_ctx                 = 512;
    params.n_batch               = 2048;
    params.n_ubatch              = 512;
    params.n_seq_max             = 1;
    params.n_outputs_max         = 0; // n_batch
    params.n_outputs_max_per_seq = 1;
    params.n_threads             = 4;
    params.n_threads_batch       = 4;
    return params;
}

llama_model * llama_model_load_from_file(const char * path, llama_model_params params) {
    Inside inside;
    const File file = file_of(path);
    if (file.vocab.texts.empty() || !file.is_model || file.faults.load) {
        return nullptr;
    }
    add_count(&Counts::models, 1);
    add_count(&Counts::loads, 1);
    return new llama_model{path, params, {file.vocab}, {}, {}};
}

void llama_model_free(llama_model * model) {
    Inside inside;
    if (model == nullptr) {
        return;
    }
    if (model->n_contexts > 0) {
        violate("llama_model_free: the model still has contexts");
    }
    add_count(&Counts::models, -1);
    add_count(&Counts::adapters, -static_cast<int>(model->adapters.size()));
    delete model;
}

// Freed with the model, as in the real one.
llama_adapter_lora * llama_adapter_lora_init(llama_model * model, const char * path) {
    Inside inside;
    const File file = file_of(path);
    if (!file.is_adapter || file.faults.adapter) {
        return nullptr;
    }
    if (model->n_contexts > 0) {
        violate("llama_adapter_lora_init: the graphs of contexts that are there have no room for it");
    }
    model->adapters.push_back(std::make_unique<llama_adapter_lora>(llama_adapter_lora{path}));
    add_count(&Counts::adapters, 1);
    return model->adapters.back().get();
}

const llama_vocab * llama_model_get_vocab(const llama_model * model) { return &model->vocab; }

int32_t llama_model_n_ctx_train(const llama_model * model) {
    Inside inside;
    return file_of(model->path).n_ctx_train;
}

int32_t llama_model_n_swa(const llama_model * model) {
    Inside inside;
    return file_of(model->path).n_swa;
}

llama_context * llama_init_from_model(llama_model * model, llama_context_params params) {
    Inside    inside;
    Lifecycle lifecycle;
    const File file = file_of(model->path);
    if (file.faults.context || params.n_seq_max > 256) {
        return nullptr;
    }
    const uint32_t multiple = fake::settings().n_ctx_multiple;
    const uint32_t n_ctx    = params.n_ctx == 0 ? file.n_ctx_train : params.n_ctx;
    params.n_batch          = std::min(params.n_batch, n_ctx);
    params.n_ctx            = (n_ctx + multiple - 1) / multiple * multiple;
    params.n_outputs_max    = params.n_outputs_max == 0 ? params.n_batch : params.n_outputs_max;
    if (params.n_seq_max > params.n_outputs_max) {
        violate("llama_init_from_model: n_outputs_max <= cparams.n_outputs_max, with n_outputs_max at least n_seq_max");
        return nullptr;
    }
    auto * ctx           = new llama_context{model, params, {}, {}, {}, params.n_threads, params.n_threads_batch};
    ctx->memory.ctx      = ctx;
    ++model->n_contexts;
    add_count(&Counts::contexts, 1);
    return ctx;
}

void llama_free(llama_context * ctx) {
    Inside inside;
    if (ctx == nullptr) {
        return;
    }
    Lifecycle lifecycle;
    {
        Use use(ctx);
        --ctx->model->n_contexts;
    }
    add_count(&Counts::contexts, -1);
    delete ctx;
}

// Whether a fault refuses this llama_set_adapters_lora.
static bool refuses(const std::string & path) {
    std::lock_guard<std::mutex> lock(state_mutex);
    fake::Faults & faults = state().files[path].faults;
    if (faults.set_in == 0 || --faults.set_in > 0) {
        return false;
    }
    faults.set_in = faults.set_always ? 1 : 0;
    return true;
}

int32_t llama_set_adapters_lora(llama_context * ctx, llama_adapter_lora ** adapters, size_t n, float * scales) {
    Inside inside;
    Use    use(ctx);
    const auto is_ours = [&](const auto & ours) { return n == 1 && ours.get() == adapters[0]; };
    if (std::none_of(ctx->model->adapters.begin(), ctx->model->adapters.end(), is_ours)) {
        violate("llama_set_adapters_lora: not one adapter of this model");
        return -1;
    }
    if (refuses(adapters[0]->path)) {
        return -1;
    }
    ctx->adapter = adapters[0]->path;
    ctx->scale   = scales[0];
    return 0;
}

uint32_t llama_n_ctx(const llama_context * ctx) { return ctx->params.n_ctx; }
uint32_t llama_n_batch(const llama_context * ctx) { return ctx->params.n_batch; }

void llama_set_n_threads(llama_context * ctx, int32_t n, int32_t n_batch) {
    Inside inside;
    Use    use(ctx);
    if (n < 1 || n_batch < 1) {
        violate("llama_set_n_threads: fewer than one thread");
    }
    ctx->n_threads       = n;
    ctx->n_threads_batch = n_batch;
}

//
// llama.h: memory
//

llama_memory_t llama_get_memory(const llama_context * ctx) { return const_cast<llama_memory_i *>(&ctx->memory); }

static bool bad_sequence(const llama_context * ctx, llama_seq_id seq_id, const char * what) {
    if (seq_id >= 0 && seq_id < static_cast<llama_seq_id>(ctx->params.n_seq_max)) {
        return false;
    }
    violate(what);
    return true;
}

static void forget(llama_context * ctx) {
    const auto none = [](const Cell & cell) { return cell.seqs.empty(); };
    ctx->cells.erase(std::remove_if(ctx->cells.begin(), ctx->cells.end(), none), ctx->cells.end());
}

static bool in_range(const Cell & cell, llama_pos p0, llama_pos p1) { return cell.pos >= p0 && (p1 < 0 || cell.pos < p1); }

void llama_memory_clear(llama_memory_t mem, bool) {
    Inside inside;
    Use    use(mem->ctx);
    mem->ctx->cells.clear();
}

bool llama_memory_seq_rm(llama_memory_t mem, llama_seq_id s, llama_pos p0, llama_pos p1) {
    Inside inside;
    Use    use(mem->ctx);
    if (s != -1 && bad_sequence(mem->ctx, s, "llama_memory_seq_rm: no such sequence")) {
        return false;
    }
    const bool all = s < 0;
    int        n_in = 0, n_out = 0;
    for (const Cell & cell : mem->ctx->cells) {
        if (all || cell.seqs.count(s)) {
            in_range(cell, p0, p1) ? ++n_in : ++n_out;
        }
    }
    if (n_in > 0 && n_out > 0 && file_of(mem->ctx->model->path).recurrent) {
        return false;
    }
    for (Cell & cell : mem->ctx->cells) {
        if (in_range(cell, p0, p1)) {
            all ? cell.seqs.clear() : void(cell.seqs.erase(s));
            all ? cell.lost.clear() : void(cell.lost.erase(s));
        }
    }
    forget(mem->ctx);
    return true;
}

void llama_memory_seq_cp(llama_memory_t mem, llama_seq_id s, llama_seq_id t, llama_pos p0, llama_pos p1) {
    Inside inside;
    Use    use(mem->ctx);
    if (bad_sequence(mem->ctx, s, "llama_memory_seq_cp: no such source") || bad_sequence(mem->ctx, t, "llama_memory_seq_cp: no such target")) {
        return;
    }
    if (!mem->ctx->params.kv_unified && s != t && (p0 > 0 || p1 > 0)) {
        violate("llama_memory_seq_cp: a part of a stream");
    }
    const bool all = file_of(mem->ctx->model->path).recurrent;
    for (Cell & cell : mem->ctx->cells) {
        if (cell.seqs.count(s) && (all || in_range(cell, p0, p1))) {
            cell.seqs.insert(t);
            cell.lost.count(s) ? void(cell.lost.insert(t)) : void(cell.lost.erase(t));
        }
    }
}

void llama_memory_seq_keep(llama_memory_t mem, llama_seq_id s) {
    Inside inside;
    Use    use(mem->ctx);
    if (bad_sequence(mem->ctx, s, "llama_memory_seq_keep: no such sequence")) {
        return;
    }
    for (Cell & cell : mem->ctx->cells) {
        cell.seqs = cell.seqs.count(s) ? std::set<llama_seq_id>{s} : std::set<llama_seq_id>{};
        cell.lost = cell.lost.count(s) ? cell.seqs : std::set<llama_seq_id>{};
    }
    forget(mem->ctx);
}

llama_pos llama_memory_seq_pos_min(llama_memory_t mem, llama_seq_id s) {
    Inside    inside;
    Use       use(mem->ctx);
    const bool is_state = file_of(mem->ctx->model->path).recurrent;
    llama_pos  first    = -1;
    for (const Cell & cell : mem->ctx->cells) {
        if (cell.seqs.count(s) && !cell.lost.count(s)) {
            first = first < 0 ? cell.pos : is_state ? std::max(first, cell.pos) : std::min(first, cell.pos);
        }
    }
    return first;
}

llama_pos llama_memory_seq_pos_max(llama_memory_t mem, llama_seq_id s) {
    Inside    inside;
    Use       use(mem->ctx);
    llama_pos last = -1;
    for (const Cell & cell : mem->ctx->cells) {
        last = cell.seqs.count(s) ? std::max(last, cell.pos) : last;
    }
    return last;
}

//
// llama.h: decoding
//

int32_t llama_decode(llama_context * ctx, llama_batch batch) {
    Inside inside;
    Use    use(ctx);
    Decode decode(ctx, batch.n_tokens);
    ++ctx->n_decodes;
    ctx->batches.push_back(batch.n_tokens);
    take_time();
    return evaluate(ctx, batch, planned_fault(ctx->model->path));
}

void llama_synchronize(llama_context * ctx) {
    Use use(ctx);
    ++ctx->n_synchronizes;
}

// As in the real one there is a buffer even where there are no rows.
float * llama_get_logits(llama_context * ctx) {
    Inside inside;
    Use    use(ctx);
    ctx->rows.reserve(1);
    return ctx->rows.data();
}

//
// llama.h: vocabulary
//

int32_t      llama_vocab_n_tokens(const llama_vocab * vocab) { return static_cast<int32_t>(vocab->of.texts.size()); }
const char * llama_vocab_get_text(const llama_vocab * vocab, llama_token token) { return vocab->of.texts.at(token).c_str(); }
llama_token_attr llama_vocab_get_attr(const llama_vocab * vocab, llama_token token) { return vocab->of.attrs.at(token); }
bool         llama_vocab_is_eog(const llama_vocab * vocab, llama_token token) { return vocab->of.ends.count(token) > 0; }

#define ROLE(name) \
    llama_token llama_vocab_##name(const llama_vocab * vocab) { \
        Inside inside; \
        return role(vocab, #name); \
    }
ROLE(bos) ROLE(eos) ROLE(eot) ROLE(sep) ROLE(nl) ROLE(pad)
ROLE(fim_pre) ROLE(fim_suf) ROLE(fim_mid) ROLE(fim_pad) ROLE(fim_rep) ROLE(fim_sep)

//
// llama.h: samplers
//

llama_sampler * llama_sampler_init(llama_sampler_i * iface, llama_sampler_context_t ctx) {
    Inside inside;
    add_count(&Counts::samplers, 1);
    return new llama_sampler{iface, ctx};
}

void llama_sampler_free(llama_sampler * smpl) {
    if (smpl == nullptr) {
        return;
    }
    if (smpl->iface->free) {
        smpl->iface->free(smpl);
    }
    Inside inside;
    add_count(&Counts::samplers, -1);
    delete smpl;
}

llama_sampler * llama_sampler_clone(const llama_sampler * smpl) { return smpl->iface->clone(smpl); }

// What the real one does without copy_state: dst gets the insides of a clone.
void llama_sampler_copy(const llama_sampler * src, llama_sampler * dst) {
    llama_sampler * clone = llama_sampler_clone(src);
    dst->iface->free(dst);
    dst->ctx = clone->ctx;
    Inside inside;
    add_count(&Counts::samplers, -1);
    delete clone;
}

//
// gguf.h
//

gguf_context * gguf_init_from_file(const char * path, gguf_init_params params) {
    Inside inside;
    const File file = file_of(path);
    if (file.keys.empty()) {
        return nullptr;
    }
    if (params.ctx != nullptr || !params.no_alloc) {
        violate("gguf_init_from_file: asked for the weights");
    }
    add_count(&Counts::ggufs, 1);
    return new gguf_context{{file.keys.begin(), file.keys.end()}, file.tensors};
}

void gguf_free(gguf_context * ctx) {
    Inside inside;
    add_count(&Counts::ggufs, ctx ? -1 : 0);
    delete ctx;
}

int64_t gguf_get_n_kv(const gguf_context * ctx) { return static_cast<int64_t>(ctx->keys.size()); }

int64_t gguf_find_key(const gguf_context * ctx, const char * key) {
    for (size_t i = 0; i < ctx->keys.size(); ++i) {
        if (ctx->keys[i].first == key) {
            return static_cast<int64_t>(i);
        }
    }
    return -1;
}

gguf_type gguf_get_kv_type(const gguf_context * ctx, int64_t key) { return value_at(ctx, key).type; }

const void * gguf_get_val_data(const gguf_context * ctx, int64_t key) {
    const Value & v = value_at(ctx, key);
    return expect(v, v.type != GGUF_TYPE_STRING && v.type != GGUF_TYPE_ARRAY, "gguf_get_val_data: no single number").bytes.data();
}

const char * gguf_get_val_str(const gguf_context * ctx, int64_t key) {
    const Value & v = value_at(ctx, key);
    return expect(v, v.type == GGUF_TYPE_STRING, "gguf_get_val_str: no string").strings.front().c_str();
}

gguf_type gguf_get_arr_type(const gguf_context * ctx, int64_t key) {
    const Value & v = value_at(ctx, key);
    return expect(v, v.type == GGUF_TYPE_ARRAY, "gguf_get_arr_type: no array").element;
}

size_t gguf_get_arr_n(const gguf_context * ctx, int64_t key) {
    const Value & v = value_at(ctx, key);
    expect(v, v.type == GGUF_TYPE_ARRAY, "gguf_get_arr_n: no array");
    return v.element == GGUF_TYPE_STRING ? v.strings.size() : v.bytes.size() / (v.element == GGUF_TYPE_UINT32 ? 4 : 8);
}

const void * gguf_get_arr_data(const gguf_context * ctx, int64_t key) {
    const Value & v = value_at(ctx, key);
    return expect(v, v.type == GGUF_TYPE_ARRAY && v.element != GGUF_TYPE_STRING, "gguf_get_arr_data: no array of numbers").bytes.data();
}

const char * gguf_get_arr_str(const gguf_context * ctx, int64_t key, size_t i) {
    const Value & v = value_at(ctx, key);
    expect(v, v.type == GGUF_TYPE_ARRAY && v.element == GGUF_TYPE_STRING, "gguf_get_arr_str: no array of strings");
    return v.strings.at(i).c_str();
}

int64_t      gguf_get_n_tensors(const gguf_context * ctx) { return static_cast<int64_t>(ctx->tensors.size()); }
const char * gguf_get_tensor_name(const gguf_context * ctx, int64_t tensor) { return ctx->tensors.at(tensor).name.c_str(); }
ggml_type    gguf_get_tensor_type(const gguf_context * ctx, int64_t tensor) { return ctx->tensors.at(tensor).type; }
