// Which rows of a sequence must not give the tokens that begin and end reasoning (adlocal-control.h).

#pragma once

#include "adlocal-control.h"
#include "llama.h"

namespace plugin {

// What was asked for.
struct Think {
    llama_token     open  = LLAMA_TOKEN_NULL;
    llama_token     close = LLAMA_TOKEN_NULL;
    adl_think_state state = ADL_THINK_ALLOWED;
};

// How far a sequence's request is, by positions, so that what is cut off is forgotten.
class Progress {
  public:
    // A token was decoded; with a row where the program may sample after it.
    void decoded(const Think & think, llama_pos pos, llama_token token, bool has_row) {
        if (prompt_end_ < 0) {
            prompt_end_ = has_row ? pos : -1;
        } else if (pos > prompt_end_ && token == think.close && (closed_ < 0 || pos < closed_)) {
            closed_ = pos;
        }
    }

    // Nothing is left from this position on.
    void cut(llama_pos pos) {
        prompt_end_ = prompt_end_ < pos ? prompt_end_ : -1;
        closed_     = closed_ < pos ? closed_ : -1;
    }

    // Whether the row after the token at this position must not give either token.
    bool bans(const Think & think, llama_pos pos) const {
        return think.state == ADL_THINK_NEVER || (think.state == ADL_THINK_ONCE && closed_ >= 0 && pos >= closed_);
    }

  private:
    llama_pos prompt_end_ = -1; // of its last token, the first that had a row; −1 before
    llama_pos closed_     = -1; // of the first `close` that was sampled; −1 without
};

} // namespace plugin
