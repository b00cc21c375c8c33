// A test harness in one header: TEST(name) { CHECK(...); } registers itself, main() of check::run() runs all of them.
// A failed check is printed with its values and the test goes on; `check::after_each` may check what every test must leave.

#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
    const char * name;
    void (*body)();
};

inline std::vector<Test> tests;
inline void (*after_each)() = nullptr;
inline int        n_failed = 0; // checks
inline std::mutex mutex;        // tests may check from several threads

inline void fail(const char * file, int line, const std::string & what) {
    std::lock_guard<std::mutex> lock(mutex);
    if (++n_failed <= 50) { // a loop of thousands of checks that all fail says it once
        std::printf("%s:%d: %s\n", std::strrchr(file, '/') ? std::strrchr(file, '/') + 1 : file, line, what.c_str());
    }
}

template <typename A, typename B>
std::string values(const char * a, const char * b, const char * relation, const A & x, const B & y) {
    std::ostringstream s;
    s.precision(9);
    s << a << " " << relation << " " << b << ", but they are " << x << " and " << y;
    return s.str();
}

inline void run_one(const Test & test, int & n_bad) {
    const int before = n_failed;
    try {
        test.body();
    } catch (const std::exception & error) {
        fail(test.name, 0, std::string("threw ") + error.what());
    }
    if (after_each) {
        after_each();
    }
    n_bad += n_failed > before;
    std::printf("%s %s\n", n_failed > before ? "FAILED" : "ok    ", test.name);
    std::fflush(stdout); // what comes after may end the process
}

// Runs the tests whose name contains `filter`. The exit status.
inline int run(const char * filter) {
    int n_bad = 0, n_run = 0;
    for (const Test & test : tests) {
        if (std::strstr(test.name, filter) != nullptr) {
            run_one(test, n_bad);
            ++n_run;
        }
    }
    std::printf("%d of %d tests failed\n", n_bad, n_run);
    return n_bad > 0 || n_run == 0 ? 1 : 0;
}

} // namespace check

#define TEST(name) static void name(); static const bool name##_added = (check::tests.push_back({#name, name}), true); static void name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "expected " #condition))
#define CHECK_RELATION(a, b, holds, relation) [&](const auto & x, const auto & y) { \
    (holds) ? void() : check::fail(__FILE__, __LINE__, check::values(#a, #b, relation, x, y)); }(a, b)
#define CHECK_EQ(a, b) CHECK_RELATION(a, b, x == y, "==")
#define CHECK_NEAR(a, b, tolerance) CHECK_RELATION(a, b, std::fabs(x - y) <= (tolerance), "is near")
#define CHECK_CONTAINS(text, words) CHECK_RELATION(std::string(text), std::string(words), x.find(y) != std::string::npos, "contains")
#define MAIN int main(int argc, char ** argv) { return check::run(argc > 1 ? argv[1] : ""); }
