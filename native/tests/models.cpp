#include "models.hpp"

#include "check.hpp"

#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace models {

using namespace fake;

Vocab vocab(int32_t n) {
    Vocab v;
    for (int32_t i = 0; i < n; ++i) {
        v.texts.push_back("t" + std::to_string(i));
        v.attrs.push_back(i <= EOT ? LLAMA_TOKEN_ATTR_CONTROL : LLAMA_TOKEN_ATTR_NORMAL);
    }
    v.ends  = {EOS, EOT};
    v.roles = {{"bos", BOS}, {"eos", EOS}, {"eot", EOT}};
    return v;
}

std::map<std::string, Value> keys(int32_t sign) {
    return {
        {"adlocal.format_version",     u32(2)},
        {"adlocal.format",             text("halves")},
        {"adlocal.bundle_id",          text(BUNDLE_ID)},
        {"adlocal.converter",          text("adlocal 0.1.0")},
        {"adlocal.epsilon",            f64(EPSILON)},
        {"adlocal.gradient.norm",      f64(7.05)},
        {"adlocal.gradient.loss",      f64(1.25)},
        {"adlocal.gradient.traces",    u32(96)},
        {"adlocal.gradient.tokens",    u32(9876)},
        {"adlocal.delta_scale",        f64(DELTA_SCALE)},
        {"adlocal.guard",              f64(0.05)},
        {"adlocal.capabilities.names",   texts({"math", "code"})},
        {"adlocal.capabilities.weights", f64s({0.7, 0.3})},
        {"adlocal.capabilities.norms",   f64s({7.0, 5.0})},
        {"adlocal.capabilities.losses",  f64s({1.2, 1.3})},
        {"adlocal.capabilities.traces",  u32s({90, 6})},
        {"adlocal.capabilities.sha256",  texts({"dd", "ee"})},
        {"adlocal.capabilities.cosines", f64s({1.0, 0.2, 0.2, 1.0})},
        {"adlocal.params",             text("all")},
        {"adlocal.params.excluded",    texts({"output.weight", "token_embd.weight"})},
        {"adlocal.quality",            text("balanced")},
        {"adlocal.adapter.rank",       u32(0)},
        {"adlocal.carriers.names",     texts({"blk.0.attn_norm.weight", "blk.0.ffn_up.weight"})},
        {"adlocal.carriers.fraction",  f64(0.05)},
        {"adlocal.carriers.energy",    f64(0.4)},
        {"adlocal.carriers.sha256",    texts({"aa", "bb"})},
        {"adlocal.fidelity.median",    f64(0.97)},
        {"adlocal.fidelity.p10",       f64(0.9)},
        {"adlocal.fidelity.slope",     f64(0.55)},
        {"adlocal.fidelity.positions", u32(300)},
        {"adlocal.fidelity.top_k",     u32(64)},
        {"adlocal.fidelity.forced",    boolean(false)},
        {"adlocal.sweep.epsilon",      f64s({0.001, 0.01})},
        {"adlocal.sweep.median",       f64s({0.6, 0.97})},
        {"adlocal.sweep.p10",          f64s({0.4, 0.9})},
        {"adlocal.sweep.slope",        f64s({0.9, 0.55})},
        {"adlocal.base.sha256",        text("cc")},
        {"adlocal.base.bytes",         u64(98000000)},
        {"adlocal.sign",               i32(sign)},
        {"general.architecture",       text("llama")},
    };
}

adl_bundle empty_bundle() {
    adl_bundle bundle = {};
    bundle.size       = sizeof bundle;
    return bundle;
}

static File half(int32_t sign) {
    File f;
    f.keys      = keys(sign);
    f.tensors   = {{"token_embd.weight", GGML_TYPE_Q4_1}, {"blk.0.attn_norm.weight", GGML_TYPE_F32}, {"blk.0.ffn_up.weight", GGML_TYPE_F16}};
    f.vocab     = vocab(N_PROXY);
    f.seed      = 11;
    f.own_seed  = sign > 0 ? 21 : 22;
    f.own_scale = 0.02f; // Δ of the order of 1
    return f;
}

// Every test must leave no model, context, file or sampler behind, and do nothing that would have ended the process.
static void check_left() {
    CHECK_EQ(fake::violations(), "");
    CHECK_EQ(fake::counts().models, 0);
    CHECK_EQ(fake::counts().contexts, 0);
    CHECK_EQ(fake::counts().adapters, 0);
    CHECK_EQ(fake::counts().ggufs, 0);
    CHECK_EQ(fake::counts().samplers, 0);
    fake::counts() = {};
}

void install() {
    check::after_each = check_left;
    fake::reset();
    File & teacher      = file(TEACHER);
    teacher.keys        = {{"general.architecture", text("llama")}};
    teacher.vocab       = vocab(N_TEACHER);
    teacher.seed        = 31;
    file(PLUS)          = half(1);
    file(MINUS)         = half(-1);
}

void install_adapter() {
    install();
    std::filesystem::create_directories(ADAPTER_DIR);
    for (const char * path : {BASE, ADAPTER}) {
        File & f = file(path) = half(path == BASE ? 0 : 1);
        f.keys["adlocal.format"]          = text("adapter");
        f.keys["adlocal.adapter.rank"]    = u32(4);
        f.keys["adlocal.carriers.sha256"] = texts({"aa"});
        f.own_scale                       = 0;
        std::ofstream(path, std::ios::trunc);
    }
    File & adapter                     = file(ADAPTER);
    adapter.keys["adapter.lora.alpha"] = f32(0);
    adapter.tensors                    = {{"blk.0.ffn_up.weight.lora_a", GGML_TYPE_F32}, {"blk.0.ffn_up.weight.lora_b", GGML_TYPE_F32}};
    adapter.vocab                      = {};
    adapter.is_model                   = false;
    adapter.is_adapter                 = true;
    adapter.own_scale                  = 2; // Δ of the order of 1
}

llama_model * load(const char * path) {
    return llama_model_load_from_file(path, llama_model_default_params());
}

adl_pair_params params() {
    const adl_llama llama                 = fake_llama_table();
    adl_pair_params p                     = adl_pair_default_params(&llama);
    p.context.n_ctx                       = 128;
    p.context.n_batch                     = 32;
    p.context.n_seq_max                   = 4;
    p.context.n_outputs_max               = 16;
    p.context.n_outputs_max_per_seq       = 16;
    p.context.n_threads                   = 2;
    p.context.n_threads_batch             = 2;
    p.concurrency                         = ADL_CONCURRENCY_TURNS;
    return p;
}

Batch::Batch(const Tokens & tokens, llama_pos first) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        add(tokens[i], first + static_cast<llama_pos>(i), {0}, i + 1 == tokens.size());
    }
}

Batch & Batch::add(llama_token token, llama_pos pos, std::vector<llama_seq_id> seq_ids, bool output) {
    tokens_.push_back(token);
    pos_.push_back(pos);
    n_seq_id_.push_back(static_cast<int32_t>(seq_ids.size()));
    seq_ids_.push_back(std::move(seq_ids));
    outputs_.push_back(output);
    return *this;
}

llama_batch Batch::get() {
    pointers_.clear();
    for (auto & seq_ids : seq_ids_) {
        pointers_.push_back(seq_ids.data());
    }
    return {static_cast<int32_t>(tokens_.size()), tokens_.data(), nullptr, pos_.data(), n_seq_id_.data(), pointers_.data(), outputs_.data()};
}

Host::Host(const adl_pair_params & params, const char * dir) : teacher(load()) {
    const adl_llama llama = fake_llama_table();
    pair                  = adl_pair_init(&llama, dir, teacher, params);
    if (pair == nullptr) {
        throw std::runtime_error(std::string("no pair: ") + adl_last_error());
    }
}

Host::~Host() {
    adl_pair_free(pair);
    llama_model_free(teacher);
}

Stepped::Stepped(const adl_pair_params & params, bool full) : Host(params) {
    llama_context_params p = llama_context_default_params();
    p.n_ctx = 512, p.n_batch = 64, p.n_seq_max = 4, p.kv_unified = true;
    context                  = llama_init_from_model(teacher, p);
    adl_lockstep_params with = adl_lockstep_default_params();
    with.full                = full;
    lockstep                 = adl_lockstep_init(pair, context, with);
}

Stepped::~Stepped() {
    adl_lockstep_free(lockstep);
    llama_free(context);
}

std::string batches(const adl_pair * pair, size_t n_before) {
    const std::vector<int32_t> plus = fake::batches(adl_pair_get_context(pair, ADL_PLUS));
    CHECK(plus == fake::batches(adl_pair_get_context(pair, ADL_MINUS)));
    std::string sizes;
    for (size_t i = n_before; i < plus.size(); ++i) {
        sizes += (i > n_before ? " " : "") + std::to_string(plus[i]);
    }
    return sizes;
}

bool is_closed(const float * row, int32_t n) {
    const float other = row[BOS];
    bool        closed = other <= -1e6f && std::isfinite(other);
    for (int32_t i = 0; i < n; ++i) {
        closed &= row[i] == (i == EOS || i == EOT ? 0.0f : other);
    }
    return closed;
}

} // namespace models
