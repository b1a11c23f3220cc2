// Threads: the ones torch already has where it runs on OpenMP, so that two pools never fight for the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace halfbyte {

using Work = void (*)(void* context, std::int64_t part, std::int64_t begin, std::int64_t end);

// How many parts `count` things are split into for so many threads.
constexpr std::int64_t parts_of(std::int64_t count, int threads) {
    return count < threads ? count : (threads > 1 ? threads : (count > 0 ? 1 : 0));
}

// Calls work(context, part, begin, end) for the consecutive parts of [0, count), at the same time where
// threads are to be had. `work` must not throw.
void parallel_for(std::int64_t count, int threads, Work work, void* context);

template <class Function>
void parallel(std::int64_t count, int threads, Function& work) {
    parallel_for(
        count, threads,
        [](void* context, std::int64_t part, std::int64_t begin, std::int64_t end) {
            (*static_cast<Function*>(context))(part, begin, end);
        },
        &work);
}

// Calls work(slot, task) for every task below `count`; a thread that has done one takes the next. No two
// calls with the same slot (below `threads`) run at the same time.
template <class Function>
void parallel_tasks(std::int64_t count, int threads, Function& work) {
    std::atomic<std::int64_t> next{0};
    auto take = [&](std::int64_t slot, std::int64_t, std::int64_t) {
        for (std::int64_t task = next++; task < count; task = next++) work(slot, task);
    };
    parallel(parts_of(count, threads), threads, take);
}

// Which threads run: "openmp" or "std::thread".
const char* thread_source();

}  // namespace halfbyte
