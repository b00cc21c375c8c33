// adlocal.h and its initializer in C, with the toy llama.cpp linked in as a C host has the real one.

#include "adlocal.h"

#include <stdio.h>
#include <string.h>

int main(void) {
    struct adl_llama llama = ADL_LLAMA_LINKED;
    if (adl_llama_check(&llama) != ADL_OK) {
        printf("adl_llama_check: %s\n", adl_last_error());
        return 1;
    }
    // A host that fills the table by name relies on each place being where the names say.
    size_t n_structs = 0;
    while (adl_llama_struct_name(n_structs) != NULL) {
        ++n_structs;
    }
    for (size_t i = 0; adl_llama_function_name(i) != NULL; ++i) {
        if (strcmp(adl_llama_function_name(i), "llama_decode") == 0) {
            void * pointer;
            memcpy(&pointer, (char *) &llama + sizeof(size_t) * (1 + n_structs) + sizeof(void *) * i, sizeof pointer);
            return memcmp(&pointer, &llama.llama_decode, sizeof pointer) != 0;
        }
    }
    return 1;
}
