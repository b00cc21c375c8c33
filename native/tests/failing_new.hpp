// operator new that can be told to fail, for the whole test binary. What the toy llama.cpp allocates does not count.

#pragma once

#include <cstdint>

namespace failing_new {

// While it lives, allocation number `first` (from 0) fails, and every later one too if `all`.
class Plan {
  public:
    Plan(int64_t first, bool all);
    ~Plan();
    bool reached() const; // has one failed?
};

} // namespace failing_new
