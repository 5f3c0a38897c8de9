// A small pool of worker threads. No OpenMP: a wheel then needs no library of the compiler's.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace iosr {

// Threads that this process may use, which an affinity mask can make fewer than exist; at least 1.
std::size_t usable_threads();

// task(worker, i) is run once for each i in [0, n_tasks), by whichever worker is free. It must not throw.
struct Phase {
    std::size_t n_tasks;
    std::function<void(std::size_t worker, std::size_t i)> task;
};

// Runs the phases one after another, each finished before the next begins, on the caller (worker 0) and on up to
// n_workers - 1 threads of the pool. A thread joins when it wakes up; the caller never waits for one that hasn't, and
// does all of the work itself where the pool is busy with another call or threads can't be started. Safe after fork().
void run_phases(std::size_t n_workers, const std::vector<Phase>& phases);

}  // namespace iosr
