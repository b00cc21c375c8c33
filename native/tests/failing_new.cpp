#include "failing_new.hpp"

#include "fake_llama.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<bool>    planned{false}, all{false}, failed{false};
std::atomic<int64_t> left{0};

bool fails() {
    if (!planned || fake::inside()) {
        return false;
    }
    const int64_t before = left--;
    if (before == 0 || (before < 0 && all)) {
        failed = true;
        return true;
    }
    return false;
}

void * allocate(std::size_t size) {
    return fails() ? nullptr : std::malloc(size == 0 ? 1 : size);
}

void * allocate_or_throw(std::size_t size) {
    void * memory = allocate(size);
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return memory;
}

} // namespace

namespace failing_new {

Plan::Plan(int64_t first, bool every_later_one) {
    left    = first;
    all     = every_later_one;
    failed  = false;
    planned = true;
}

Plan::~Plan() { planned = false; }

bool Plan::reached() const { return failed; }

} // namespace failing_new

void * operator new(std::size_t size) { return allocate_or_throw(size); }
void * operator new[](std::size_t size) { return allocate_or_throw(size); }
void * operator new(std::size_t size, const std::nothrow_t &) noexcept { return allocate(size); }
void * operator new[](std::size_t size, const std::nothrow_t &) noexcept { return allocate(size); }
void   operator delete(void * p) noexcept { std::free(p); }
void   operator delete[](void * p) noexcept { std::free(p); }
void   operator delete(void * p, std::size_t) noexcept { std::free(p); }
void   operator delete[](void * p, std::size_t) noexcept { std::free(p); }
void   operator delete(void * p, const std::nothrow_t &) noexcept { std::free(p); }
void   operator delete[](void * p, const std::nothrow_t &) noexcept { std::free(p); }
