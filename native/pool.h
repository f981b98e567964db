// A small persistent thread pool: workers spin briefly for the next job, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
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

    // The caller of `run` is one of the threads. Fewer are made when the system refuses more.
    explicit Pool(int num_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return int(workers_.size()) + 1; }

    // Calls work(context, item, scratch) for every item below num_items, the highest first; returns when all are done.
    // Each thread has its own 64-byte aligned scratch. One job at a time: other callers wait, and an item that calls
    // `run` does all of that job by itself. The first exception of an item is thrown here, once no item runs any more;
    // items that nobody had begun are dropped.
    void run(int64_t num_items, int64_t scratch_floats, Work work, void* context);

   private:
    struct Free {
        void operator()(float* p) const;
    };
    using Scratch = std::unique_ptr<float, Free>;

    static Scratch make_scratch(int64_t num_floats);
    void reserve(int64_t scratch_floats);
    void work_loop(int thread);
    bool await_items();
    uint32_t take_items(int thread);
    uint32_t drop_items(std::exception_ptr error);
    void await_workers();
    void wake_workers();

    std::mutex mutex_;  // held by the caller whose job it is
    int64_t scratch_floats_ = 0;
    uint32_t expected_ = 0;  // what `finished_` is when the workers are done with the job
    std::mutex error_mutex_;
    std::exception_ptr error_;
    std::vector<Scratch> scratch_;
    std::vector<std::thread> workers_;

    // Cache lines by who writes them. A worker that has taken an item holds the rest of the job in the same line.
    alignas(64) std::atomic<int32_t> left_{0};  // items that nobody has taken; below 0 when some came too late
    Work work_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> finished_{0};  // items that workers finished, of all jobs together
    std::atomic<bool> caller_sleeps_{false};
    alignas(64) std::atomic<uint32_t> sleepers_{0};  // workers that need `wakeups_` to change
    std::atomic<uint32_t> wakeups_{0};
};

}  // namespace elbowroom
