#include "lockstep.hpp"

#include "adjust.hpp"
#include "error.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

using adl::Cell;
using adl::Entry;
using adl::Error;
using adl::format;
using adl::Output;
using adl::Sequence;

// A token that waits, and the row that follows it: −1 where none is wanted.
struct adl_lockstep::Wanted {
    llama_seq_id seq_id;
    Cell         cell;
    int32_t      row;
};

namespace {

constexpr llama_pos LAST = std::numeric_limits<llama_pos>::max();

bool is_steered(const adl_row_params & params) {
    return params.mode == ADL_MODE_OBSERVE || (params.mode == ADL_MODE_PROTECT && params.strength > 0);
}

void check_params(const adl_row_params & params) {
    if (params.mode != ADL_MODE_OFF && params.mode != ADL_MODE_OBSERVE && params.mode != ADL_MODE_PROTECT) {
        throw Error{ADL_ERROR_INPUT, format("mode=%d: give ADL_MODE_OFF, ADL_MODE_OBSERVE or ADL_MODE_PROTECT", params.mode)};
    }
    adl::check_strength(params.strength, params.guard);
}

void check_tokens(const llama_token * tokens, size_t n, int32_t n_vocab) {
    const auto bad = std::find_if(tokens, tokens + n, [n_vocab](llama_token token) { return token < 0 || token >= n_vocab; });
    if (bad != tokens + n) {
        throw Error{ADL_ERROR_INPUT, format("token %d is none of the teacher's %d", *bad, n_vocab)};
    }
}

void check_dose(double dose) {
    if (!std::isfinite(dose)) {
        throw Error{ADL_ERROR_PROXY, format("a token's dose is %g: the proxies' logits are not numbers; no text is emitted", dose)};
    }
}

// The first of the cells whose position is at least `pos`.
size_t at_position(const std::vector<Cell> & cells, llama_pos pos) {
    const auto found = std::lower_bound(cells.begin(), cells.end(), pos, [](const Cell & cell, llama_pos p) { return cell.pos < p; });
    return static_cast<size_t>(found - cells.begin());
}

// Where the prompt ends among the cells that wait from `first` on; `first` where none of them is of a prompt.
size_t end_of_prompt(const std::vector<Cell> & cells, size_t first) {
    size_t end = cells.size();
    while (end > first && !cells[end - 1].in_prompt) {
        --end;
    }
    return end;
}

} // namespace

adl_lockstep::adl_lockstep(adl_pair & p, llama_context * context, const adl_lockstep_params & params)
    : pair(p), teacher(context), llama_(p.llama), memory_(llama_.llama_get_memory(context)), full_(params.full),
      n_batch_(p.n_ubatch()), n_outputs_max_(p.n_outputs_max()), serial_(p.serial()) {
    if (memory_ == nullptr) {
        throw Error{ADL_ERROR_INPUT, "the teacher's context has no memory: embedding models write no text; give a decoder-only model"};
    }
    pair.clear();
    follow_pair();
}

//
// The step
//

void adl_lockstep::begin(const llama_batch & batch, const adl_row_params * rows, int32_t n_rows) {
    if (under_way_) {
        throw Error{ADL_ERROR_INPUT, "a step is under way: tell adl_lockstep_end how the teacher's decode ended"};
    }
    outputs_.clear();
    if (batch.token == nullptr || batch.n_tokens < 1) {
        throw Error{ADL_ERROR_PROXY, "the batch holds no tokens (multimodal input is embeddings), and the proxies evaluate nothing else"};
    }
    step_ = adl::resolve(batch, [this](llama_seq_id seq_id) { return llama_.llama_memory_seq_pos_max(memory_, seq_id); });
    check_positions();
    const auto n_outputs = std::count_if(step_.begin(), step_.end(), [](const Entry & entry) { return entry.row >= 0; });
    if (n_outputs != n_rows || (n_rows > 0 && rows == nullptr)) {
        throw Error{ADL_ERROR_INPUT, format("%d row parameters for %d output rows; give one a row", n_rows, static_cast<int>(n_outputs))};
    }
    std::for_each(rows, rows + n_rows, check_params);
    params_.assign(rows, rows + n_rows);
    make_room();
    under_way_ = true;
}

// What commit() will need: once the teacher has decoded, nothing may keep us from knowing what it holds.
void adl_lockstep::make_room() {
    outputs_.reserve(params_.size());
    for (const Entry & entry : step_) {
        for (const llama_seq_id seq_id : entry.seq_ids) {
            auto & cells = sequence(seq_id).cells;
            if (cells.capacity() < cells.size() + step_.size()) {
                cells.reserve(2 * (cells.size() + step_.size()));
            }
        }
    }
}

llama_pos adl_lockstep::last_known(llama_seq_id seq_id) const {
    const auto found = sequences_.find(seq_id);
    return found == sequences_.end() || found->second.cells.empty() ? -1 : found->second.cells.back().pos;
}

// Tokens have to follow what is known of their sequence, and that has to be what the teacher holds.
void adl_lockstep::check_positions() const {
    std::map<llama_seq_id, llama_pos> last;
    for (const Entry & entry : step_) {
        for (const llama_seq_id seq_id : entry.seq_ids) {
            const auto [at, is_first] = last.emplace(seq_id, last_known(seq_id));
            const llama_pos held      = is_first ? llama_.llama_memory_seq_pos_max(memory_, seq_id) : at->second;
            if (held != at->second || entry.pos <= at->second) {
                throw Error{ADL_ERROR_PROXY,
                            format("position %d of sequence %d comes after position %d, and the teacher's memory ends at %d: something "
                                   "changed it around adlocal; clear both",
                                   entry.pos, seq_id, at->second, held)};
            }
            at->second = entry.pos;
        }
    }
}

void adl_lockstep::end(int32_t status) {
    if (!under_way_) {
        throw Error{ADL_ERROR_INPUT, "no step is under way: adl_lockstep_begin comes before the teacher's decode"};
    }
    under_way_ = false;
    failure_status_ = ADL_OK;
    const auto n_rows = static_cast<int32_t>(params_.size());
    if (status != 0) {
        // llama.cpp leaves the rows of earlier micro-batches readable, and where it refused a batch those of the last one.
        n_readable_ = status == 2 || status < -2 ? std::max(n_rows, n_readable_) : n_readable_;
        close(n_readable_);
        roll_back();
        return;
    }
    n_readable_ = n_rows;
    commit();
    try {
        notice();
        for (int32_t row = 0; row < n_rows; ++row) {
            look(row);
        }
        evaluate_rows();
        catch_up_long();
    } catch (...) { // out of memory, say: no row may be read that was not seen to
        close(n_rows);
        outputs_.clear();
        throw;
    }
    if (failure_status_ != ADL_OK) {
        throw Error{failure_status_, failure_};
    }
}

// Notes what the teacher's memory holds now, and whose each row is.
void adl_lockstep::commit() noexcept {
    for (const Entry & entry : step_) {
        for (const llama_seq_id seq_id : entry.seq_ids) {
            sequence(seq_id).cells.push_back({entry.pos, entry.token, entry.in_prompt});
        }
        if (entry.row >= 0) {
            const llama_seq_id seq_id = entry.seq_ids[0];
            const auto         params = params_[outputs_.size()];
            outputs_.push_back({params, {0.0, 0, false, false}, seq_id, sequence(seq_id).cells.size() - 1, {}});
            sequence(seq_id).steered = is_steered(params);
        }
    }
}

// What a decode that failed has left of its batch is dropped from the teacher's memory.
void adl_lockstep::roll_back() {
    for (const Entry & entry : step_) {
        for (const llama_seq_id seq_id : entry.seq_ids) {
            if (!llama_.llama_memory_seq_rm(memory_, seq_id, last_known(seq_id) + 1, -1)) { // recurrent memory forgets all or nothing
                seq_rm(seq_id, -1, -1);
            }
        }
    }
}

void adl_lockstep::close(int32_t n_rows) const noexcept {
    float * logits = n_rows > 0 ? llama_.llama_get_logits(teacher) : nullptr;
    for (int32_t row = 0; logits != nullptr && row < n_rows; ++row) {
        pair.close_row(logits + static_cast<size_t>(row) * pair.n_vocab_teacher);
    }
}

float * adl_lockstep::row_of(int32_t row) const {
    return llama_.llama_get_logits(teacher) + static_cast<size_t>(row) * pair.n_vocab_teacher;
}

// Has the teacher a choice here?
void adl_lockstep::look(int32_t row) {
    Output & output = outputs_[row];
    ++stats_.n_rows;
    if (!is_steered(output.params)) {
        return;
    }
    try {
        output.result.n_candidates = pair.n_candidates(row_of(row), output.params.guard);
        stats_.n_choices += output.result.n_candidates > 1 ? 1 : 0;
    } catch (const Error & error) {
        fail(output, row, error);
    }
}

// Evaluates the pair where a row has a choice. What fails closes the rows that needed it; the others stay.
void adl_lockstep::evaluate_rows() {
    std::map<llama_seq_id, std::map<size_t, int32_t>> rows; // of each sequence: cell and row
    for (int32_t row = 0; row < n_rows(); ++row) {
        const Output & output = outputs_[row];
        const bool     whole  = full_ || output.params.full;
        if (is_steered(output.params) && !output.result.closed && (whole || output.result.n_candidates > 1)) {
            rows[output.seq_id][output.cell] = row;
        }
    }
    std::vector<Wanted> prompts, wanted;
    for (const auto & [seq_id, of] : rows) {
        const Sequence & s     = sequence(seq_id);
        const size_t     alone = end_of_prompt(s.cells, s.n_held), end = std::max(alone, of.rbegin()->first + 1);
        for (size_t i = s.n_held; i < end; ++i) { // a prompt to its end, whichever of its rows have a choice
            const auto found = of.find(i);
            (i < alone ? prompts : wanted).push_back({seq_id, s.cells[i], found == of.end() ? -1 : found->second});
        }
    }
    const size_t n_prompt = prompts.size();
    prompts.insert(prompts.end(), wanted.begin(), wanted.end());
    evaluate(prompts, n_prompt);
}

// How many of the tokens from `first` on go into one batch, the first `n_prompt` being of prompts. On CPU kernels a row depends on
// the batch that it was evaluated in, and a prompt that is cached has to give the rows of a fresh one: so its last token,
// which is the first to be evaluated from a cache, is not batched with those before it, and batches begin where llama.cpp
// would cut a fresh one.
size_t adl_lockstep::batch_size(const std::vector<Wanted> & wanted, size_t first, size_t n_prompt) const {
    const size_t end = std::min(first < n_prompt ? n_prompt : wanted.size(), first + n_batch_);
    size_t       n_rows = wanted[first].row >= 0, i = first + 1;
    for (; i < end; ++i) {
        if (wanted[i].seq_id == wanted[i - 1].seq_id && static_cast<size_t>(wanted[i].cell.pos) % n_batch_ == 0) {
            break;
        }
        n_rows += wanted[i].row >= 0;
        if (n_rows > n_outputs_max_) {
            break;
        }
    }
    return i - first;
}

void adl_lockstep::evaluate(const std::vector<Wanted> & wanted, size_t n_prompt) {
    for (size_t done = 0; done < wanted.size();) {
        const size_t n = batch_size(wanted, done, n_prompt);
        try {
            decode(&wanted[done], n);
        } catch (const Error & error) {
            return fail_from(wanted, done, error);
        } catch (const std::exception & error) {
            return fail_from(wanted, done, {ADL_ERROR_PROXY, *pair.error ? pair.error : error.what()});
        } catch (...) {
            return fail_from(wanted, done, {ADL_ERROR_PROXY, pair.error});
        }
        done += n;
    }
}

// The pair could not be evaluated from here on: what needed it is closed, and all of it waits again.
void adl_lockstep::fail_from(const std::vector<Wanted> & wanted, size_t first, const Error & error) {
    const Error kept = error; // clearing the pair clears its words
    forget_held();
    for (size_t i = first; i < wanted.size(); ++i) {
        if (const int32_t row = wanted[i].row; row >= 0) {
            fail(outputs_[row], row, kept);
        }
    }
}

// Decodes tokens that wait in one batch of the pair.
void adl_lockstep::decode_batch(const Wanted * wanted, size_t n) {
    std::vector<llama_token>    token(n);
    std::vector<llama_pos>      pos(n);
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id>   seq(n);
    std::vector<llama_seq_id *> seq_id(n);
    std::vector<int8_t>         logits(n);
    for (size_t i = 0; i < n; ++i) {
        token[i]  = wanted[i].cell.token;
        pos[i]    = wanted[i].cell.pos;
        seq[i]    = wanted[i].seq_id;
        seq_id[i] = &seq[i];
        logits[i] = wanted[i].row >= 0;
    }
    pair.decode({static_cast<int32_t>(n), token.data(), nullptr, pos.data(), n_seq_id.data(), seq_id.data(), logits.data()});
    follow_pair();
    ++stats_.n_pair_decodes;
    stats_.n_pair_tokens += static_cast<int64_t>(n);
    for (size_t i = 0; i < n; ++i) {
        ++sequence(wanted[i].seq_id).n_held;
    }
}

// Decodes them, and finishes their rows.
void adl_lockstep::decode(const Wanted * wanted, size_t n) {
    decode_batch(wanted, n);
    int32_t pair_row = 0;
    for (size_t i = 0; i < n; ++i) {
        if (const int32_t row = wanted[i].row; row >= 0) {
            finish(outputs_[row], row, pair_row++);
        }
    }
}

// Adjusts a row whose Δ is there.
void adl_lockstep::finish(Output & output, int32_t row, int32_t pair_row) {
    try {
        const bool protect = output.params.mode == ADL_MODE_PROTECT;
        float *    logits  = row_of(row);
        double     mean    = 0;
        if (protect) {
            const adl_row adjusted = pair.adjust_row(logits, pair_row, output.params.strength, output.params.guard);
            output.result.kl       = adjusted.kl;
            mean                   = adjusted.mean;
        } else {
            mean = pair.expectation(pair_row);
            check_dose(mean);
        }
        output.proxies          = pair.copy_row(pair_row, mean);
        output.result.evaluated = true;
        ++stats_.n_evaluated;
    } catch (const Error & error) {
        fail(output, row, error);
    }
}

void adl_lockstep::fail(Output & output, int32_t row, const Error & error) {
    pair.close_row(row_of(row));
    output.result.closed = true;
    if (failure_status_ == ADL_OK) {
        failure_status_ = error.status;
        failure_        = error.message;
    }
}

// The proxies' side of a row of the last step, NULL where the pair was not evaluated for it.
const adl::Evaluated * adl_lockstep::evaluated(int32_t row) const noexcept {
    return row >= 0 && row < n_rows() && outputs_[row].result.evaluated ? &outputs_[row].proxies : nullptr;
}

double adl_lockstep::dose(int32_t row, llama_token token) const noexcept {
    const adl::Evaluated * proxies = evaluated(row);
    return proxies != nullptr && token >= 0 ? proxies->dose(token) : std::numeric_limits<double>::quiet_NaN();
}

const float * adl_lockstep::logits(int32_t row, adl_sign sign) const noexcept {
    const adl::Evaluated * proxies = evaluated(row);
    return proxies == nullptr ? nullptr : (sign == ADL_PLUS ? proxies->plus : proxies->minus).data();
}

// The rows before the tokens are evaluated afresh, in batches of as many as the pair has room for.
void adl_lockstep::doses(llama_seq_id seq_id, llama_pos pos, const llama_token * tokens, size_t n_tokens, double * out) {
    const Sequence & s     = sequence(seq_id);
    const size_t     first = at_position(s.cells, pos);
    const llama_pos  there = first < s.cells.size() ? s.cells[first].pos : last_known(seq_id) + 1;
    if (first == 0 || pos != there || first + n_tokens > s.cells.size() + 1) {
        throw Error{ADL_ERROR_INPUT, format("%zu tokens from position %d on: sequence %d holds %zu; all but the last have to be decoded, and "
                                            "one before them", n_tokens, pos, seq_id, s.cells.size())};
    }
    check_tokens(tokens, n_tokens, pair.n_vocab_teacher);
    outputs_.clear();
    if (n_tokens == 0) {
        return;
    }
    notice();
    hold_only(seq_id, first - 1);
    const size_t        n_before = first - 1 - s.n_held;
    std::vector<Wanted> wanted;
    for (size_t i = s.n_held; i + 1 < first + n_tokens; ++i) {
        wanted.push_back({seq_id, s.cells[i], i + 1 < first ? -1 : static_cast<int32_t>(i + 1 - first)});
    }
    try {
        for (size_t done = 0, n = 0; done < wanted.size(); done += n) {
            n = batch_size(wanted, done, n_before);
            decode_batch(&wanted[done], n);
            int32_t pair_row = 0;
            for (size_t i = done; i < done + n; ++i) {
                if (const int32_t row = wanted[i].row; row >= 0) {
                    out[row] = pair.dose(pair_row++, tokens[row]);
                    check_dose(out[row]);
                }
            }
        }
    } catch (...) {
        forget_held();
        throw;
    }
}

size_t adl_lockstep::n_held(llama_seq_id seq_id) const {
    const auto found = sequences_.find(seq_id);
    return found == sequences_.end() || pair.serial() != serial_ ? 0 : found->second.n_held;
}

size_t adl_lockstep::copy_tokens(llama_seq_id seq_id, llama_token * tokens, llama_pos * pos, size_t capacity) const noexcept {
    const auto found = sequences_.find(seq_id);
    if (found == sequences_.end()) {
        return 0;
    }
    const auto & cells = found->second.cells;
    for (size_t i = 0; i < std::min(capacity, cells.size()); ++i) {
        tokens[i] = cells[i].token;
        pos[i]    = cells[i].pos;
    }
    return cells.size();
}

//
// What waits
//

// Evaluates what waits of a sequence, up to a cell, without rows.
void adl_lockstep::catch_up(llama_seq_id seq_id, size_t end) {
    const Sequence &    s        = sequence(seq_id);
    const size_t        n_prompt = end_of_prompt(s.cells, s.n_held) - s.n_held;
    std::vector<Wanted> wanted;
    for (size_t i = s.n_held; i < end; ++i) {
        wanted.push_back({seq_id, s.cells[i], -1});
    }
    evaluate(wanted, n_prompt);
}

void adl_lockstep::catch_up(llama_seq_id seq_id) {
    catch_up(seq_id, sequence(seq_id).cells.size());
}

// A long prompt is evaluated as it comes, so that it does not stall the others when it is needed. What was sampled after it
// goes on waiting, as it does after a prompt that was cached.
void adl_lockstep::catch_up_long() {
    for (auto & [seq_id, s] : sequences_) {
        if (s.steered && s.cells.size() - s.n_held > n_batch_) {
            const size_t end = end_of_prompt(s.cells, s.n_held);
            catch_up(seq_id, end > s.n_held ? end : s.cells.size());
        }
    }
}

// The pair's memory is nothing that can be relied on: it starts afresh, and everything waits again.
void adl_lockstep::forget_held() noexcept {
    pair.clear();
    follow_pair();
    for (auto & each : sequences_) {
        each.second.n_held = 0;
    }
}

// Somebody else may have used the pair.
void adl_lockstep::notice() noexcept {
    if (pair.serial() != serial_) {
        forget_held();
    }
}

void adl_lockstep::follow_pair() noexcept {
    serial_ = pair.serial();
}

//
// Memory
//

void adl_lockstep::clear() {
    llama_.llama_memory_clear(memory_, true);
    pair.clear();
    follow_pair();
    sequences_.clear();
    outputs_.clear();
    under_way_ = false;
}

bool adl_lockstep::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    notice();
    const llama_pos from = std::max(p0, 0), to = p1 < 0 ? LAST : p1;
    for (auto & [id, s] : sequences_) {
        const bool is_middle = (seq_id < 0 || id == seq_id) && at_position(s.cells, to) < s.cells.size() && at_position(s.cells, from) < s.cells.size();
        if (is_middle && s.waits()) { // what stays was computed with what goes
            catch_up(id);
        }
    }
    if (!llama_.llama_memory_seq_rm(memory_, seq_id, p0, p1)) {
        return false;
    }
    for (auto & [id, s] : sequences_) {
        if (seq_id < 0 || id == seq_id) {
            rm(id, s, from, to);
        }
    }
    return true;
}

// Has the pair hold no more than the first n tokens of a sequence.
void adl_lockstep::hold_only(llama_seq_id seq_id, size_t n) {
    Sequence & s = sequence(seq_id);
    if (n >= s.n_held) {
        return;
    }
    if (n > 0 && pair.seq_rm(seq_id, s.cells[n].pos, -1)) {
        s.n_held = n;
    } else { // recurrent memory cannot forget a part
        pair.seq_rm(seq_id, -1, -1);
        s.n_held = 0;
    }
    follow_pair();
}

void adl_lockstep::rm(llama_seq_id seq_id, Sequence & s, llama_pos from, llama_pos to) {
    const size_t first = at_position(s.cells, from), last = std::max(first, at_position(s.cells, to));
    if (first < std::min(last, s.n_held)) {
        const size_t n_gone = std::min(last, s.n_held) - first;
        if (pair.seq_rm(seq_id, from, to == LAST ? -1 : to)) {
            s.n_held -= n_gone;
        } else { // recurrent memory cannot forget a part
            pair.seq_rm(seq_id, -1, -1);
            s.n_held = 0;
        }
        follow_pair();
    }
    s.cells.erase(s.cells.begin() + static_cast<std::ptrdiff_t>(first), s.cells.begin() + static_cast<std::ptrdiff_t>(last));
}

void adl_lockstep::seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    if (source == target) {
        return;
    }
    notice();
    if (sequence(source).steered) { // once for all copies
        catch_up(source);
    }
    catch_up(target);
    llama_.llama_memory_seq_cp(memory_, source, target, p0, p1);
    const llama_pos    from = std::max(p0, 0), to = p1 < 0 ? LAST : p1;
    const Sequence     s     = sequence(source);
    Sequence &         t     = sequence(target);
    const size_t       first = at_position(s.cells, from), last = std::max(first, at_position(s.cells, to));
    const size_t       n_held = std::min(std::max(s.n_held, first), last) - first;
    const bool         follows = t.cells.empty() || first == last || t.cells.back().pos < s.cells[first].pos;
    if (n_held > 0) {
        if (n_held == s.n_held) { // streams can only be copied whole
            pair.seq_cp(source, target, -1, -1);
        } else {
            pair.seq_cp(source, target, from, s.cells[first + n_held - 1].pos + 1);
        }
        follow_pair();
    }
    t.steered = s.steered;
    t.cells.insert(t.cells.end(), s.cells.begin() + static_cast<std::ptrdiff_t>(first), s.cells.begin() + static_cast<std::ptrdiff_t>(last));
    t.n_held += n_held;
    // A part of what the pair holds is no copy of its memory where that keeps a state, or a window.
    const bool is_whole = n_held == 0 || n_held == s.n_held || pair.remembers(target, s.cells[first].pos, s.cells[first + n_held - 1].pos + 1);
    if (!follows) { // cells between cells: evaluated afresh, in order
        std::sort(t.cells.begin(), t.cells.end(), [](const Cell & a, const Cell & b) { return a.pos < b.pos; });
    }
    if (!follows || !is_whole) {
        pair.seq_rm(target, -1, -1);
        follow_pair();
        t.n_held = 0;
    }
}

void adl_lockstep::seq_keep(llama_seq_id seq_id) {
    notice();
    llama_.llama_memory_seq_keep(memory_, seq_id);
    pair.seq_keep(seq_id);
    follow_pair();
    Sequence kept = std::move(sequence(seq_id));
    sequences_.clear();
    sequences_.emplace(seq_id, std::move(kept));
}

void adl_lockstep::restore(llama_seq_id seq_id, const llama_token * tokens, const llama_pos * pos, size_t n_tokens, size_t n_held) {
    outputs_.clear();
    std::vector<Cell> cells;
    for (size_t i = 0; i < n_tokens; ++i) {
        cells.push_back({pos ? pos[i] : static_cast<llama_pos>(i), tokens[i], i + 1 < n_tokens});
    }
    if (n_held == 0) {
        notice();
        pair.seq_rm(seq_id, -1, -1);
    } else {
        for (auto & each : sequences_) {
            each.second.n_held = 0;
        }
    }
    follow_pair();
    Sequence & s = sequence(seq_id);
    s            = {};
    s.cells      = std::move(cells);
    s.n_held     = std::min(n_held, n_tokens);
}
