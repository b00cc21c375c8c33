// How the program is to be protected, and what it is told.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace plugin {

// Says a line and ends the process with status 1: nothing of the teacher may be shown that is not protected.
[[noreturn]] void die(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

// Says a line.
void say(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

// How to protect, from ADLOCAL_* variables, which `adlocal run` sets.
struct Config {
    std::string              bundle;
    double                   strength;
    double                   guard;
    double                   epsilon; // 0: the bundle's
    bool                     observe; // the pair is evaluated, nothing changes
    int32_t                  proxy_threads;      // 0: the teacher's
    int32_t                  proxy_n_gpu_layers; // INT32_MIN: llama.cpp's default
    std::vector<std::string> allowed; // models of other vocabularies that may generate
    std::string              control_directory; // of the control file; "" for none

    static Config of_environment();
};

// A path as the system has it, without links; as it is where there is nothing.
std::string canonical(const std::string & path);

} // namespace plugin
