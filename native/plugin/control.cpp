#include "control.hpp"

#include "config.hpp"
#include "system.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

namespace plugin {

namespace {

constexpr int PATIENCE = 1000; // looks at settings that are being written; the writer needs a microsecond

// The file of this process, whose number is another's after a fork. They outlive everything that may end the process.
const std::string * file  = nullptr;
pid_t               maker = 0;

template <size_t N>
void copy_text(char (&target)[N], const char * text) {
    std::strncpy(target, text, N - 1);
}

// Consistent settings; false where nobody finishes writing them.
bool read(const adl_control_settings & shared, adl_control_settings & out) {
    const volatile adl_control_settings & s = shared;
    for (int look = 0; look < PATIENCE; ++look) {
        const uint64_t before = s.epoch;
        std::atomic_thread_fence(std::memory_order_acquire);
        out = {before, s.strength, s.guard, s.mode, s.think_open, s.think_close, s.think_state};
        std::atomic_thread_fence(std::memory_order_acquire);
        if (before % 2 == 0 && s.epoch == before) {
            return true;
        }
        sched_yield();
    }
    return false;
}

bool think_makes_sense(const adl_control_settings & s, int32_t n_vocab) {
    const auto may_be = [n_vocab](int32_t token) { return token >= LLAMA_TOKEN_NULL && token < n_vocab; };
    if (s.think_state == ADL_THINK_ALLOWED) {
        return true;
    }
    return may_be(s.think_open) && may_be(s.think_close) &&
           (s.think_state == ADL_THINK_NEVER || (s.think_state == ADL_THINK_ONCE && s.think_close != LLAMA_TOKEN_NULL));
}

bool make_sense(const adl_control_settings & s, int32_t n_vocab) {
    return std::isfinite(s.strength) && s.strength >= 0 && s.guard >= 0 && s.guard <= 1 && s.mode >= ADL_MODE_OFF &&
           s.mode <= ADL_MODE_PROTECT && think_makes_sense(s, n_vocab);
}

bool protects(const adl_control_settings & s) {
    return s.mode == ADL_MODE_PROTECT && s.strength > 0;
}

// Never less than the floor.
adl_control_settings raised(const adl_control_settings & floor, const adl_control_settings & asked) {
    if (asked.epoch == 0) {
        return floor;
    }
    const bool only_observes = floor.mode == ADL_MODE_OBSERVE; // and goes on doing so
    if (!protects(floor) && !only_observes) {
        return asked;
    }
    const bool           is_more = protects(asked) && !only_observes;
    adl_control_settings result  = asked;
    result.strength              = is_more ? std::max(floor.strength, asked.strength) : floor.strength;
    result.guard                 = is_more ? std::min(floor.guard, asked.guard) : floor.guard;
    result.mode                  = floor.mode;
    return result;
}

} // namespace

Control::Control(const Config & config)
    : floor_({0, config.strength, config.guard, config.observe ? ADL_MODE_OBSERVE : ADL_MODE_PROTECT,
              LLAMA_TOKEN_NULL, LLAMA_TOKEN_NULL, ADL_THINK_ALLOWED}) {
    const std::string unfinished = config.control_directory.empty() ? "" : map(config.control_directory);
    if (!config.control_directory.empty() && unfinished.empty()) {
        say("%s: no control file can be made there (%s); protection goes on, and `adlocal status` will not show this program",
            config.control_directory.c_str(), std::strerror(errno));
    }
    if (control_ == nullptr) {
        control_ = new adl_control();
    }
    copy_text(control_->program, program_name());
    copy_text(control_->bundle, config.bundle.c_str());
    control_->version   = ADL_CONTROL_VERSION;
    control_->size      = sizeof *control_;
    control_->n_seq_max = ADL_CONTROL_N_SEQ_MAX;
    control_->pid       = static_cast<uint32_t>(getpid());
    control_->started   = std::time(nullptr);
    control_->floor     = floor_;
    std::atomic_thread_fence(std::memory_order_release);
    std::memcpy(control_->magic, ADL_CONTROL_MAGIC, sizeof control_->magic);
    if (!unfinished.empty()) {
        show(unfinished);
    }
}

std::string Control::map(const std::string & directory) {
    std::string path = directory + "/" + std::to_string(getpid()) + ".new";
    unlink(path.c_str()); // of an earlier program with our number
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        return "";
    }
    void * const mapped = flock(fd, LOCK_EX | LOCK_NB) == 0 && ftruncate(fd, sizeof(adl_control)) == 0
        ? mmap(nullptr, sizeof(adl_control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        : MAP_FAILED;
    if (mapped == MAP_FAILED) {
        const int error = errno;
        unlink(path.c_str());
        close(fd);
        errno = error;
        return "";
    }
    control_ = static_cast<adl_control *>(mapped); // and the descriptor stays open: it holds the lock
    return path;
}

void Control::show(const std::string & unfinished) {
    const std::string name = unfinished.substr(0, unfinished.rfind('.')) + ".control";
    if (rename(unfinished.c_str(), name.c_str()) != 0) {
        say("%s: %s; `adlocal status` will not show this program", name.c_str(), std::strerror(errno));
        unlink(unfinished.c_str());
        return;
    }
    file  = new std::string(name);
    maker = getpid();
}

void Control::remove_file() {
    if (maker == getpid()) {
        unlink(file->c_str());
    }
}

Latched Control::latch(llama_seq_id seq_id, int32_t n_vocab) {
    adl_control_sequence & sequence = control_->sequences[seq_id];
    adl_control_settings   asked;
    const bool             whole  = read(sequence.asked, asked);
    const bool             closed = !whole || (asked.epoch != 0 && !make_sense(asked, n_vocab));
    if (closed) {
        say("control file: the settings of sequence %d are %s; its rows are closed", seq_id,
            whole ? "out of range" : "begun and not finished");
    }
    const adl_control_settings in_force = closed ? floor_ : raised(floor_, asked);
    sequence.in_force                   = in_force;
    ++sequence.counters.n_begun;
    const Think think = {in_force.think_open, in_force.think_close, static_cast<adl_think_state>(in_force.think_state)};
    return {{in_force.strength, in_force.guard, in_force.mode, false}, think, closed};
}

void Control::copy(llama_seq_id source, llama_seq_id target) {
    control_->sequences[target].in_force = control_->sequences[source].in_force;
}

} // namespace plugin
