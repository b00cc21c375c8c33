// What the program that `adlocal run` became is told when it ends.

#include "process.hpp"
#include "system.hpp"

#include <cstdlib>
#include <unistd.h>

namespace {

// The program itself, and none of its children, which inherit the variable.
bool is_the_program() {
    const char * pid = std::getenv("ADLOCAL_PID");
    return pid != nullptr && std::atol(pid) == static_cast<long>(getpid());
}

__attribute__((destructor)) void farewell() {
    plugin::Control::remove_file();
    if (is_the_program() && !plugin::Process::has_protected()) {
        plugin::say("%s made no context of a protected model: nothing of it was protected", plugin::program_name());
    }
}

} // namespace
