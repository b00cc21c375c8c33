// The whole of embedding adlocal in C: load a teacher and a bundle, generate under protection.
//
//     simple -m teacher.gguf -b bundle/ [-n n_predict] [-s strength] [-t n_threads] [prompt]
//
// Compare llama.cpp's examples/simple: what is new is marked "adlocal".

#include "adlocal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options {
    const char * model;
    const char * bundle;
    const char * prompt;
    int          n_predict;
    int          n_threads;
    double       strength;
};

static int usage(const char * program) {
    fprintf(stderr, "usage: %s -m teacher.gguf -b bundle/ [-n n_predict] [-s strength] [-t n_threads] [prompt]\n", program);
    return 2;
}

static int parse(int argc, char ** argv, struct options * o) {
    for (int i = 1; i < argc; i++) {
        const char * value = i + 1 < argc ? argv[i + 1] : NULL;
        if (argv[i][0] != '-') {
            o->prompt = argv[i];
            continue;
        }
        if (value == NULL) {
            return -1;
        }
        switch (argv[i][1]) {
            case 'm': o->model     = value;       break;
            case 'b': o->bundle    = value;       break;
            case 'n': o->n_predict = atoi(value); break;
            case 't': o->n_threads = atoi(value); break;
            case 's': o->strength  = atof(value); break;
            default: return -1;
        }
        i++;
    }
    return o->model && o->bundle && o->n_predict > 0 && o->n_threads > 0 ? 0 : -1;
}

static void only_errors(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) {
        fputs(text, stderr);
    }
}

// Returns the number of tokens in *tokens, which the caller frees; negative on failure.
static int tokenize(const struct llama_vocab * vocab, const char * text, llama_token ** tokens) {
    const int n = -llama_tokenize(vocab, text, (int32_t) strlen(text), NULL, 0, true, true);
    *tokens     = malloc((size_t) (n > 0 ? n : 1) * sizeof **tokens);
    return *tokens && n > 0 ? llama_tokenize(vocab, text, (int32_t) strlen(text), *tokens, n, true, true) : -1;
}

static void print_piece(const struct llama_vocab * vocab, llama_token token) {
    char      piece[256];
    const int n = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
    if (n > 0) {
        fwrite(piece, 1, (size_t) n, stdout);
        fflush(stdout);
    }
}

static int failed(int32_t status) {
    const char * words = status < 0 ? adl_last_error() : "there is no room in the teacher's context";
    fprintf(stderr, "%s\n", status == ADL_ERROR_MEMORY ? "out of memory" : words);
    return 1;
}

// adlocal: all of the prompt but its last token, without a row to sample from. A row depends on the batch that it was evaluated
// in; with the last token by itself it is the same whether the rest is decoded now or was kept from an earlier request.
static int32_t decode_prompt(struct adl_lockstep * lockstep, llama_token * prompt, int n_prompt) {
    if (n_prompt == 1) {
        return ADL_OK;
    }
    struct llama_batch batch  = llama_batch_get_one(prompt, n_prompt - 1);
    int32_t            status = ADL_ERROR_MEMORY;
    batch.logits              = calloc((size_t) n_prompt, 1);
    if (batch.logits != NULL) {
        status = adl_lockstep_decode(lockstep, batch, NULL, 0, NULL);
    }
    free(batch.logits);
    return status;
}

// The loop that every llama.cpp program has. Returns an exit status.
static int generate(
        struct llama_context * ctx, struct adl_lockstep * lockstep, struct llama_sampler * chain, llama_token * prompt, int n_prompt,
        const struct options * o) {
    const struct llama_vocab *  vocab  = llama_model_get_vocab(llama_get_model(ctx));
    const struct adl_row_params row    = {o->strength, 0.05, ADL_MODE_PROTECT, false};
    struct llama_batch          batch  = llama_batch_get_one(&prompt[n_prompt - 1], 1);
    int32_t                     status = decode_prompt(lockstep, prompt, n_prompt);
    double                      dose   = 0, kl = 0;
    int                         n_sampled = 0;
    llama_token                 token;
    if (status != ADL_OK) {
        return failed(status);
    }

    for (int i = 0; i < o->n_predict; i++) {
        struct adl_row_result result;
        status = adl_lockstep_decode(lockstep, batch, &row, 1, &result); // adlocal: in place of llama_decode
        if (status != ADL_OK) { // no token without protection
            return failed(status);
        }
        token = llama_sampler_sample(chain, ctx, -1);
        n_sampled++;
        kl += result.kl;
        dose += result.evaluated ? adl_lockstep_dose(lockstep, 0, token) : 0;
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        print_piece(vocab, token);
        batch = llama_batch_get_one(&token, 1);
    }
    printf("\n");
    fprintf(stderr, "dose %+.3f over %d tokens, KL %.3f nats a token\n", dose, n_sampled, n_sampled ? kl / n_sampled : 0.0);
    return 0;
}

// adlocal: the pair for this teacher, with the teacher's own sizes.
static struct adl_pair * open_pair(const struct options * o, const struct llama_model * teacher, struct llama_context_params teacher_params) {
    struct adl_llama llama = ADL_LLAMA_LINKED;
    if (adl_llama_check(&llama) != ADL_OK) {
        return NULL;
    }
    struct adl_pair_params params  = adl_pair_default_params(&llama);
    params.context.n_ctx           = teacher_params.n_ctx;
    params.context.n_batch         = teacher_params.n_batch;
    params.context.n_threads       = teacher_params.n_threads;
    params.context.n_threads_batch = teacher_params.n_threads_batch;
    return adl_pair_init(&llama, o->bundle, teacher, params);
}

static int run(const struct options * o, struct llama_model * model) {
    llama_token *  prompt   = NULL;
    const int      n_prompt = tokenize(llama_model_get_vocab(model), o->prompt, &prompt);
    if (n_prompt < 1) {
        fprintf(stderr, "the prompt could not be tokenized\n");
        free(prompt);
        return 1;
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = (uint32_t) (n_prompt + o->n_predict);
    params.n_batch                     = (uint32_t) n_prompt;
    params.n_threads = params.n_threads_batch = o->n_threads;

    struct llama_context * ctx    = llama_init_from_model(model, params);
    struct adl_pair *      pair   = open_pair(o, model, params);
    int                    status = 1;
    if (ctx == NULL || pair == NULL) {
        fprintf(stderr, "%s\n", ctx ? adl_last_error() : "llama.cpp could not make the teacher's context");
        status = 2;
    } else {
        struct adl_lockstep * lockstep = adl_lockstep_init(pair, ctx, adl_lockstep_default_params()); // adlocal
        if (lockstep == NULL) {
            fprintf(stderr, "%s\n", adl_last_error());
        } else {
            struct llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
            llama_sampler_chain_add(chain, llama_sampler_init_greedy());
            status = generate(ctx, lockstep, chain, prompt, n_prompt, o);
            llama_sampler_free(chain);
        }
        adl_lockstep_free(lockstep);
    }
    adl_pair_free(pair); // after its lockstep
    if (ctx) {
        llama_free(ctx);
    }
    free(prompt);
    return status;
}

int main(int argc, char ** argv) {
    struct options o = {NULL, NULL, "Once upon a time", 32, 4, 1.0};
    if (parse(argc, argv, &o) != 0) {
        return usage(argv[0]);
    }
    llama_log_set(only_errors, NULL);
    ggml_backend_load_all();
    struct llama_model * model = llama_model_load_from_file(o.model, llama_model_default_params());
    if (model == NULL) {
        fprintf(stderr, "%s: llama.cpp cannot load the teacher\n", o.model);
        return 2;
    }
    const int status = run(&o, model);
    llama_model_free(model);
    return status;
}
