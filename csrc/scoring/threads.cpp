#include "scoring/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace iosr {
namespace {

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

void relax() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

// Whether `condition` became true while spinning. In a program that scores one batch after another, the next call
// arrives sooner than a thread wakes up, and the others' last tasks end sooner.
template <typename Condition>
bool spin_until(const Condition& condition) {
    constexpr auto kPatience = std::chrono::microseconds(100);
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!condition()) {
        if (std::chrono::steady_clock::now() > end) {
            return false;
        }
        for (int i = 0; i < 16; ++i) {
            relax();
        }
    }
    return true;
}

int this_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// In virtual machines Linux may queue a waking thread behind its waker on the same core for milliseconds, although
// another core is idle (a halted virtual core probably counts as preempted by the host): two threads then take as long
// as one. So the caller yields after waking threads, and a thread on the caller's core leaves it: forbidding the core
// for a moment moves the thread at once.
void leave([[maybe_unused]] int core) {
#ifdef __linux__
    cpu_set_t allowed;
    if (core < 0 || this_core() != core || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return;
    }
    cpu_set_t others = allowed;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0) {
        sched_setaffinity(0, sizeof(allowed), &allowed);
    }
#endif
}

// The state of one run_phases call, shared by its workers.
class Job {
  public:
    const int callers_core = this_core();

    explicit Job(std::vector<Phase> phases) : phases_(std::move(phases)), counters_(new Counter[phases_.size()]) {}

    // Returns when nothing is left to begin and, for worker 0, to finish: threads may join or leave later than the
    // caller.
    void work(std::size_t worker) {
        for (std::size_t p = 0; p < phases_.size(); ++p) {
            const Phase& phase = phases_[p];
            Counter& counter = counters_[p];
            for (std::size_t i = counter.next.fetch_add(1); i < phase.n_tasks; i = counter.next.fetch_add(1)) {
                phase.task(worker, i);
                counter.done.fetch_add(1, std::memory_order_release);
            }
            const auto finished = [&] { return counter.done.load(std::memory_order_acquire) >= phase.n_tasks; };
            if (worker > 0 && p + 1 == phases_.size()) {
                return;
            }
            // If the thread of a last task waits for a core, behind another library's thread that spins there, an idle
            // core takes it over, but not one that spins or yields.
            while (!spin_until(finished)) {
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        }
    }

  private:
    struct Counter {
        alignas(64) std::atomic<std::size_t> next{0};
        alignas(64) std::atomic<std::size_t> done{0};
    };
    const std::vector<Phase> phases_;
    std::unique_ptr<Counter[]> counters_;
};

class Pool {
  public:
    const long process = process_id();

    // Returns false if another call has the pool.
    bool run(std::size_t n_workers, const std::shared_ptr<Job>& job) {
        const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine.owns_lock()) {
            return false;
        }
        grow(n_workers - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            wanted_ = n_workers - 1;
            ++round_;
        }
        wake_.notify_all();
        std::this_thread::yield();  // see leave
        job->work(0);
        const std::lock_guard<std::mutex> lock(mutex_);
        job_ = nullptr;  // threads that wake up later have nothing to join
        return true;
    }

  private:
    void grow(std::size_t count) {
        while (threads_.size() < count) {
            const std::size_t index = threads_.size() + 1;
            try {
                threads_.emplace_back([this, index, seen = round_.load()] { serve(index, seen); });
            } catch (const std::system_error&) {
                return;  // the caller and the existing threads do the work
            }
        }
    }

    [[noreturn]] void serve(std::size_t index, std::size_t seen) {
        for (;;) {
            spin_until([&] { return round_ != seen; });
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            const std::shared_ptr<Job> job = index <= wanted_ ? job_ : nullptr;
            lock.unlock();
            if (job != nullptr) {
                leave(job->callers_core);
                job->work(index);
            }
        }
    }

    std::mutex busy_;   // held by the call that has the pool
    std::mutex mutex_;  // guards the members below
    std::condition_variable wake_;
    std::shared_ptr<Job> job_;
    std::size_t wanted_ = 0;
    std::atomic<std::size_t> round_{0};  // changed under the mutex, and read without it while spinning
    std::vector<std::thread> threads_;
};

// The pool is never destroyed: its threads wait until the process ends. A child of fork() has none of them and creates
// its own pool.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};  // not a lock, which a child could inherit locked
    Pool* found = current.load();
    if (found == nullptr || found->process != process_id()) {
        auto* made = new Pool;
        if (current.compare_exchange_strong(found, made)) {
            return *made;
        }
        delete made;  // another thread was first
    }
    return *found;
}

}  // namespace

std::size_t useful_workers(std::size_t work, std::size_t threads) {
    constexpr std::size_t kThreadWork = 1 << 18;
    return std::clamp<std::size_t>(work / kThreadWork, 1, std::max<std::size_t>(threads, 1));
}

void run_phases(std::size_t n_workers, std::vector<Phase> phases) {
    const auto job = std::make_shared<Job>(std::move(phases));
    if (n_workers <= 1 || !pool().run(n_workers, job)) {
        job->work(0);
    }
}

}  // namespace iosr
