// Hammers the thread pool; built with a sanitizer and run by tests/unit/test_native_pool.py. Whatever items share with
// their caller is plain memory, so that a missing synchronisation is a data race.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

using elbowroom::Pool;

void check(bool holds, const char* claim) {
    if (holds) return;
    std::fprintf(stderr, "not so: %s\n", claim);
    std::exit(1);
}

struct Job {
    std::vector<int> runs;  // of each item
    int64_t scratch_floats;
    int64_t bad_every = 0;      // items that it divides throw; 0: none
    Pool* nested_in = nullptr;  // items give this pool a job of their own
};

void count(void* context, int64_t item, float*) { ++static_cast<std::vector<int>*>(context)->at(size_t(item)); }

void work(void* context, int64_t item, float* scratch) {
    Job& job = *static_cast<Job*>(context);
    for (int64_t i = 0; i < job.scratch_floats; ++i) scratch[i] = float(item);
    if (job.nested_in != nullptr) {
        std::vector<int> inner(3);
        job.nested_in->run(3, 16, count, &inner);
        check(inner == std::vector<int>(3, 1), "a job inside an item runs each item once");
    }
    if (job.bad_every > 0 && item % job.bad_every == 0) throw std::runtime_error("bad item");
    for (int64_t i = 0; i < job.scratch_floats; ++i) check(scratch[i] == float(item), "scratch belongs to one thread");
    ++job.runs[size_t(item)];
}

void run_job(Pool& pool, std::mt19937& random) {
    const auto below = [&](int n) { return int(random() % unsigned(n)); };
    const int num_items = below(4) == 0 ? below(3) : below(100);
    Job job{std::vector<int>(size_t(num_items)), below(200), below(4) == 0 ? 1 + below(4) : 0, below(8) == 0 ? &pool : nullptr};
    bool thrown = false;
    try {
        pool.run(num_items, job.scratch_floats, work, &job);
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    check(thrown == (job.bad_every > 0 && num_items > 0), "what an item throws arrives at the caller");
    for (const int runs : job.runs) check(runs <= 1, "no item runs twice");
    const int total = std::accumulate(job.runs.begin(), job.runs.end(), 0);
    check(thrown ? total < num_items : total == num_items, "every item runs, unless one throws");
    if (below(50) == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(600)));  // workers fall asleep
}

void hammer(Pool& pool, int num_callers, int num_jobs) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < num_callers; ++caller) {
        callers.emplace_back([&pool, caller, num_jobs] {
            std::mt19937 random(unsigned(caller) + 1);
            for (int i = 0; i < num_jobs; ++i) run_job(pool, random);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

void first_callers_share_one_pool() {
    std::atomic<Pool*> seen[4] = {};
    std::vector<std::thread> callers;
    for (auto& slot : seen) callers.emplace_back([&slot] { slot = &Pool::instance(); });
    for (std::thread& caller : callers) caller.join();
    for (const auto& slot : seen) check(slot == seen[0], "a process has one pool");
}

// Not with the thread sanitizer, which does not allow a child to make threads.
[[maybe_unused]] void a_child_has_a_pool_of_its_own() {
    std::vector<int> runs(100);
    Pool::instance().run(100, 0, count, &runs);
    const pid_t child = fork();
    if (child == 0) {
        Pool::instance().run(100, 0, count, &runs);
        _exit(runs == std::vector<int>(100, 2) ? 0 : 1);
    }
    int status = 1;
    check(waitpid(child, &status, 0) == child && status == 0, "a child has a pool of its own");
}

}  // namespace

int main() {
    first_callers_share_one_pool();
#if !defined(__SANITIZE_THREAD__)
    a_child_has_a_pool_of_its_own();
#endif
    for (int round = 0; round < 3; ++round) {
        for (const int num_threads : {1, 2, 3, 8}) {
            Pool pool(num_threads);
            check(pool.num_threads() == num_threads, "a pool has the threads that were asked for");
            hammer(pool, 1, 400);
            hammer(pool, 3, 200);
        }
    }
    std::puts("done");
}
