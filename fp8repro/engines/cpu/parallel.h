// Threads: those of the OpenMP runtime that torch brought into the process, or none.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

// Calls work(part, parts) on `threads` threads.
template <typename Work>
void parallel(int threads, const Work& work) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    work(0, 1);
}

// Calls work(item) for each of `count` items, on whichever thread is free: items must not depend on each other.
template <typename Work>
void parallel_items(int threads, int64_t count, const Work& work) {
    std::atomic<int64_t> next(0);
    parallel(count > 1 ? threads : 1, [&](int, int) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
    });
}
