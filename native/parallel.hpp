// Threads: the ones torch already has where it runs on OpenMP, so that two pools never fight for the cores.
#pragma once

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

// Which threads run: "openmp" or "std::thread".
const char* thread_source();

}  // namespace halfbyte
