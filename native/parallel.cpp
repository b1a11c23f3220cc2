// Finds the OpenMP runtime that is already in the process by its C entry point; without one, starts threads.
#include "parallel.hpp"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace halfbyte {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
#if defined(_WIN32)
    return nullptr;
#else
    // torch loads its own copy of libgomp (or LLVM's, which has the same entry) with global symbols, perhaps
    // after this module: only a find is kept.
    static std::atomic<GompParallel> entry{nullptr};
    if (entry.load(std::memory_order_relaxed) == nullptr)
        entry.store(reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
    return entry.load(std::memory_order_relaxed);
#endif
}

struct Team {
    std::int64_t count, parts;
    Work work;
    void* context;
    std::atomic<std::int64_t> next{0};

    // Takes the next part until none is left: right for any number of threads that the runtime grants.
    void run() {
        for (std::int64_t p = next++; p < parts; p = next++)
            work(context, p, count * p / parts, count * (p + 1) / parts);
    }
};

}  // namespace

void parallel_for(std::int64_t count, int threads, Work work, void* context) {
    const std::int64_t parts = parts_of(count, threads);
    if (parts <= 1) {
        if (count > 0) work(context, 0, 0, count);
        return;
    }
    Team team{count, parts, work, context};
    if (const GompParallel openmp = gomp_parallel()) {
        openmp([](void* t) { static_cast<Team*>(t)->run(); }, &team, static_cast<unsigned>(parts), 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<std::size_t>(parts - 1));
        for (std::int64_t p = 1; p < parts; ++p) others.emplace_back([&team] { team.run(); });
    } catch (const std::system_error&) {
        // The system grants no more threads: the ones that run take all parts.
    }
    team.run();
    for (std::thread& other : others) other.join();
}

const char* thread_source() { return gomp_parallel() != nullptr ? "openmp" : "std::thread"; }

}  // namespace halfbyte
