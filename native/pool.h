// A small persistent thread pool: workers spin briefly for the next job, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace elbowroom {

class Pool {
   public:
    using Work = void (*)(void* context, int64_t item, float* scratch);

    // The pool of this process; a forked child gets one of its own.
    static Pool& instance();

    explicit Pool(int num_threads);
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls work(context, item, scratch) for every item below num_items, the highest first; returns when all are done.
    // Each thread has its own 64-byte aligned scratch. One job at a time; other callers wait.
    void run(int64_t num_items, int64_t scratch_floats, Work work, void* context);

   private:
    struct Free {
        void operator()(float* p) const;
    };

    void work_loop(int thread);
    bool take(int thread);
    void reserve(int64_t scratch_floats);

    const int num_threads_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<float, Free>> scratch_;
    int64_t scratch_floats_ = 0;
    Work work_ = nullptr;
    void* context_ = nullptr;
    // High half: number of the job; low half: items that nobody has taken. Taking one proves that the job is alive.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> unfinished_{0};
    alignas(64) std::atomic<uint32_t> job_{0};
};

// Threads this process may use: min(CPU affinity, cgroup quota, ELBOWROOM_THREADS).
int usable_threads();

}  // namespace elbowroom
