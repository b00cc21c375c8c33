#include "system.hpp"

#include <cerrno>
#include <link.h>

namespace plugin {

const char * program_name() {
    return program_invocation_short_name;
}

namespace {

int note_name(dl_phdr_info * info, size_t, void * names) {
    static_cast<std::vector<std::string> *>(names)->emplace_back(info->dlpi_name);
    return 0;
}

} // namespace

std::vector<std::string> loaded_objects() {
    std::vector<std::string> names;
    dl_iterate_phdr(note_name, &names);
    return names;
}

} // namespace plugin
