#include "coverage.hpp"

#include "config.hpp"
#include "objects.hpp"
#include "system.hpp"

#include <algorithm>
#include <cstring>
#include <elf.h>
#include <link.h>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace plugin {

namespace {

// The name of a function inside llama.cpp, which it logs: programs that only call llama.cpp have no reason to hold it.
constexpr char MARK[] = "llama_model_load_from_file_impl";

const ElfW(Dyn) * dynamic_of(const dl_phdr_info & info) {
    for (int i = 0; i < info.dlpi_phnum; ++i) {
        if (info.dlpi_phdr[i].p_type == PT_DYNAMIC) {
            return reinterpret_cast<const ElfW(Dyn) *>(info.dlpi_addr + info.dlpi_phdr[i].p_vaddr);
        }
    }
    return nullptr;
}

// The tables that relocations are read from.
struct Tables {
    const ElfW(Sym) * symbols = nullptr;
    const char *      strings = nullptr;
    struct {
        const ElfW(Rela) * first = nullptr;
        size_t             size  = 0;
    } relocations, calls;
};

Tables tables_of(const dl_phdr_info & info) {
    Tables tables;
    for (const ElfW(Dyn) * entry = dynamic_of(info); entry != nullptr && entry->d_tag != DT_NULL; ++entry) {
        // The linker has relocated the addresses, unless the section may not be written.
        const auto address = entry->d_un.d_ptr < info.dlpi_addr ? entry->d_un.d_ptr + info.dlpi_addr : entry->d_un.d_ptr;
        switch (entry->d_tag) {
            case DT_SYMTAB:   tables.symbols = reinterpret_cast<const ElfW(Sym) *>(address); break;
            case DT_STRTAB:   tables.strings = reinterpret_cast<const char *>(address); break;
            case DT_RELA:     tables.relocations.first = reinterpret_cast<const ElfW(Rela) *>(address); break;
            case DT_RELASZ:   tables.relocations.size = entry->d_un.d_val; break;
            case DT_JMPREL:   tables.calls.first = reinterpret_cast<const ElfW(Rela) *>(address); break;
            case DT_PLTRELSZ: tables.calls.size = entry->d_un.d_val; break;
            default:          break;
        }
    }
    return tables;
}

ElfW(Addr) base_of(const dl_phdr_info & info) {
    const auto * const end   = info.dlpi_phdr + info.dlpi_phnum;
    const auto * const first = std::find_if(info.dlpi_phdr, end, [](const ElfW(Phdr) & segment) { return segment.p_type == PT_LOAD; });
    return first == end ? info.dlpi_addr : info.dlpi_addr + (first->p_vaddr & ~(first->p_align - 1));
}

template <typename Relocations>
bool name_llama(const Tables & tables, const Relocations & relocations) {
    for (size_t i = 0; relocations.first != nullptr && i < relocations.size / sizeof(ElfW(Rela)); ++i) {
        const auto symbol = ELF64_R_SYM(relocations.first[i].r_info);
        if (symbol != 0 && std::strncmp(tables.strings + tables.symbols[symbol].st_name, "llama_", 6) == 0) {
            return true;
        }
    }
    return false;
}

bool is_constant(const ElfW(Phdr) & segment) {
    return segment.p_type == PT_LOAD && (segment.p_flags & (PF_R | PF_W)) == PF_R;
}

// Constants lie apart from the code, but for old linkers.
bool holds_mark(const dl_phdr_info & info) {
    const auto * const first  = info.dlpi_phdr;
    const auto * const end    = first + info.dlpi_phnum;
    const auto         is_pure = [](const ElfW(Phdr) & segment) { return is_constant(segment) && (segment.p_flags & PF_X) == 0; };
    const bool         apart   = std::any_of(first, end, is_pure);
    return std::any_of(first, end, [&](const ElfW(Phdr) & segment) {
        const auto * bytes = reinterpret_cast<const void *>(info.dlpi_addr + segment.p_vaddr);
        return (apart ? is_pure(segment) : is_constant(segment)) && memmem(bytes, segment.p_filesz, MARK, sizeof MARK) != nullptr;
    });
}

// An object that holds llama.cpp, and whose relocations do not show who calls it.
struct Doubtful {
    std::string path; // "" for the program
    ElfW(Addr)  base;
};

// Whether a call from outside finds llama.cpp there.
bool exports_llama(const Doubtful & object) {
    const auto where = llama_through(object.path);
    return where && reinterpret_cast<ElfW(Addr)>(where->dli_fbase) == object.base;
}

// What has been looked at.
struct Seen {
    std::set<ElfW(Addr)>  objects;
    unsigned long long    n_loaded = 0; // as often as anything was loaded
    std::vector<Doubtful> doubtful;
};

// The first object is the program. Nothing is opened here: the linker's lock is held.
int look_at(dl_phdr_info * info, size_t, void * data) {
    auto & seen = *static_cast<Seen *>(data);
    if (base_of(*info) == reinterpret_cast<ElfW(Addr)>(own_base()) || !seen.objects.insert(base_of(*info)).second) {
        return 0;
    }
    const Tables tables = tables_of(*info);
    if (!name_llama(tables, tables.calls) && !name_llama(tables, tables.relocations) && holds_mark(*info)) {
        seen.doubtful.push_back({info->dlpi_name, base_of(*info)});
    }
    return 0;
}

unsigned long long n_loaded() {
    unsigned long long n     = 0;
    const auto         count = [](dl_phdr_info * info, size_t, void * out) {
        *static_cast<unsigned long long *>(out) = info->dlpi_adds;
        return 1;
    };
    dl_iterate_phdr(count, &n);
    return n;
}

} // namespace

void look_at_objects() {
    static std::mutex                  mutex;
    static Seen &                      seen = *new Seen; // never destroyed: threads may run on while the program ends
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock || seen.n_loaded == n_loaded()) { // another thread is looking, or was when this process was forked
        return;
    }
    seen.n_loaded = n_loaded();
    dl_iterate_phdr(look_at, &seen);
    for (const Doubtful & object : seen.doubtful) {
        if (object.path.empty() || !exports_llama(object)) {
            die("%s holds llama.cpp and calls it directly, where nothing can stand before it, so it cannot be protected; use a build with "
                "llama.cpp as a shared library", object.path.empty() ? program_name() : object.path.c_str());
        }
    }
    seen.doubtful.clear();
}

namespace {

__attribute__((constructor)) void look_at_start() {
    look_at_objects();
}

} // namespace

} // namespace plugin
