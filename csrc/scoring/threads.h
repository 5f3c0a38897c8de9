// A small pool of worker threads, without OpenMP, so that a wheel needs no library of the compiler.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace iosr {

// How many of `threads` threads (at least 1) so many multiply-adds justify waking.
std::size_t useful_workers(std::size_t work, std::size_t threads);

// Any free worker runs task(worker, i), once for each i in [0, n_tasks). It must not throw.
struct Phase {
    std::size_t n_tasks;
    std::function<void(std::size_t worker, std::size_t i)> task;
};

// Runs the phases one after another, each finished before the next begins, on the caller (worker 0) and on up to
// n_workers - 1 threads of the pool. Threads join when they wake up; the caller waits for none that has no task. The
// caller does all of the work itself if the pool is busy with another call or can't start threads. Safe after fork().
void run_phases(std::size_t n_workers, std::vector<Phase> phases);

}  // namespace iosr
