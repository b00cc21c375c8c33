#include "config.hpp"

#include "control.hpp"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

namespace plugin {

namespace {

// Where the program's errors went when it began. It may hide its own later, as llama-cpp-python does while it loads a model.
class Voice {
  public:
    Voice() : copy_(fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, FIRST)) { fstat(copy_, &begun_); }

    // A program that closed every descriptor may have put another file in the place of ours.
    int fd() const {
        struct stat now;
        return copy_ >= 0 && fstat(copy_, &now) == 0 && now.st_dev == begun_.st_dev && now.st_ino == begun_.st_ino ? copy_ : STDERR_FILENO;
    }

  private:
    static constexpr int FIRST = 64; // programs count on low numbers
    int                  copy_;
    struct stat          begun_ = {};
};

const Voice voice;

void say_line(const char * fmt, va_list arguments) {
    char line[2048];
    std::vsnprintf(line, sizeof line, fmt, arguments);
    dprintf(voice.fd(), "adlocal: %s\n", line);
}

const char * variable(const char * name) {
    const char * value = std::getenv(name);
    return value != nullptr && *value ? value : nullptr;
}

double number(const char * name, double otherwise) {
    const char * value = variable(name);
    if (value == nullptr) {
        return otherwise;
    }
    char *       end    = nullptr;
    const double result = std::strtod(value, &end);
    if (*end != '\0' || !std::isfinite(result)) {
        die("%s=%s: give a number", name, value);
    }
    return result;
}

std::vector<std::string> parts(const char * text, char separator) {
    std::vector<std::string> result;
    for (const char * from = text; from != nullptr && *from;) {
        const char * to = std::strchr(from, separator);
        result.emplace_back(from, to ? static_cast<size_t>(to - from) : std::strlen(from));
        from = to ? to + 1 : nullptr;
    }
    return result;
}

} // namespace

std::string canonical(const std::string & path) {
    char         resolved[PATH_MAX];
    const char * found = path.empty() ? nullptr : realpath(path.c_str(), resolved);
    return found ? found : path;
}

void die(const char * fmt, ...) {
    va_list arguments;
    va_start(arguments, fmt);
    say_line(fmt, arguments);
    va_end(arguments);
    Control::remove_file();
    _exit(1);
}

void say(const char * fmt, ...) {
    va_list arguments;
    va_start(arguments, fmt);
    say_line(fmt, arguments);
    va_end(arguments);
}

Config Config::of_environment() {
    Config       config;
    const char * bundle = variable("ADLOCAL_BUNDLE");
    if (bundle == nullptr) {
        die("ADLOCAL_BUNDLE is not set, and without a bundle nothing can be protected; start the program with `adlocal run`");
    }
    config.bundle             = bundle;
    config.strength           = number("ADLOCAL_STRENGTH", 1.0);
    config.guard              = number("ADLOCAL_GUARD", 0.05);
    config.epsilon            = number("ADLOCAL_EPSILON", 0.0);
    config.proxy_threads      = static_cast<int32_t>(number("ADLOCAL_PROXY_THREADS", 0));
    config.proxy_n_gpu_layers = static_cast<int32_t>(number("ADLOCAL_PROXY_N_GPU_LAYERS", INT32_MIN));
    config.observe            = variable("ADLOCAL_OBSERVE") != nullptr;
    config.control_directory  = variable("ADLOCAL_CONTROL_DIR") ? variable("ADLOCAL_CONTROL_DIR") : "";
    config.allowed            = parts(variable("ADLOCAL_ALLOW_MODELS"), '\n');
    std::transform(config.allowed.begin(), config.allowed.end(), config.allowed.begin(), canonical);
    if (config.strength < 0 || config.guard < 0 || config.guard > 1) {
        die("ADLOCAL_STRENGTH=%g, ADLOCAL_GUARD=%g: give nats from 0 up, and a share from 0 to 1", config.strength, config.guard);
    }
    return config;
}

} // namespace plugin
