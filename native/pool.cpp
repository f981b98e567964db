#include "pool.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "cpus.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

// Why a job cannot be mixed up with the next one: taking an item is one subtraction from `left_`, and whoever has taken
// one has not reported it yet, so the job is alive until he does. A worker that comes too late subtracts from nothing.
// Sleeping is announced before the last look (`sleepers_`, then `left_`), and a job is published before looking for
// sleepers; both in sequentially consistent order, so one of the two sees the other. The same holds for the caller.

namespace elbowroom {
namespace {

// What waking a sleeper costs: it took callers 20 to 150 us in a virtual machine. So spinning that long at most doubles
// the cost of a wait, and what lies between two phases of a step is shorter. Far below a time slice.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kLooksPerClock = 32;
constexpr int32_t kStop = std::numeric_limits<int32_t>::min() / 2;  // `left_` at the end; latecomers stay below it

std::atomic<Pool*> current{nullptr};
thread_local bool inside_item = false;

#if defined(__unix__) || defined(__APPLE__)
// A child has none of its parent's threads: that pool is left as it is, and never touched again.
[[maybe_unused]] const int forgotten_by_children = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks until `come()` holds; false when it did not for kSpin.
template <class Come>
bool spin_until(Come come) {
    for (int look = 0; look < kLooksPerClock; ++look, relax()) {
        if (come()) return true;
    }
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int look = 0; look < kLooksPerClock; ++look, relax()) {
            if (come()) return true;
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// While it lives, this thread is inside an item.
struct InsideItem {
    InsideItem() { inside_item = true; }
    ~InsideItem() { inside_item = false; }
};

void run_alone(int64_t num_items, float* scratch, Pool::Work work, void* context) {
    while (num_items > 0) work(context, --num_items, scratch);
}

}  // namespace

Pool& Pool::instance() {
    if (Pool* pool = current.load(std::memory_order_acquire)) return *pool;
    // No lock, which a child might inherit locked: of two callers that are first, one throws his pool away. The other is
    // never destroyed: its workers sleep until the process ends.
    auto made = std::make_unique<Pool>(usable_threads());
    Pool* pool = nullptr;
    return current.compare_exchange_strong(pool, made.get()) ? *made.release() : *pool;
}

Pool::Pool(int num_threads) : scratch_(size_t(num_threads)) {
    workers_.reserve(size_t(num_threads) - 1);
    try {
        for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back([this, thread] { work_loop(thread); });
    } catch (const std::system_error&) {  // a limit of processes: go on with the threads that there are
    }
}

Pool::~Pool() {
    left_.store(kStop);
    wake_workers();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::Free::operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }

Pool::Scratch Pool::make_scratch(int64_t num_floats) {
    return Scratch(static_cast<float*>(::operator new(size_t(num_floats) * sizeof(float), std::align_val_t{64})));
}

void Pool::reserve(int64_t scratch_floats) {
    if (scratch_floats <= scratch_floats_) return;
    for (Scratch& buffer : scratch_) buffer = make_scratch(scratch_floats);
    scratch_floats_ = scratch_floats;
}

void Pool::run(int64_t num_items, int64_t scratch_floats, Work work, void* context) {
    if (num_items <= 0) return;
    if (num_items > std::numeric_limits<int32_t>::max()) throw std::length_error("too many items for one job");
    if (inside_item) return run_alone(num_items, make_scratch(scratch_floats).get(), work, context);
    const std::lock_guard lock(mutex_);
    const InsideItem inside;
    reserve(scratch_floats);
    if (num_items == 1 || workers_.empty()) return run_alone(num_items, scratch_[0].get(), work, context);
    work_ = work, context_ = context;
    left_.store(int32_t(num_items));
    if (sleepers_.load() != 0) wake_workers();
    expected_ += uint32_t(num_items) - take_items(0);
    await_workers();
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

// Works until no item is left; returns how many items this thread has to report.
uint32_t Pool::take_items(int thread) {
    uint32_t taken = 0;
    for (int32_t left; (left = left_.fetch_sub(1, std::memory_order_acquire)) > 0;) {
        ++taken;
        try {
            work_(context_, left - 1, scratch_[size_t(thread)].get());
        } catch (...) {
            taken += drop_items(std::current_exception());
        }
    }
    return taken;
}

uint32_t Pool::drop_items(std::exception_ptr error) {
    const std::lock_guard lock(error_mutex_);
    if (error_ == nullptr) error_ = std::move(error);
    return uint32_t(std::max(left_.exchange(0, std::memory_order_acquire), 0));
}

void Pool::await_workers() {
    if (spin_until([this] { return finished_.load(std::memory_order_acquire) == expected_; })) return;
    caller_sleeps_.store(true);
    for (uint32_t finished; (finished = finished_.load()) != expected_;) finished_.wait(finished);
    caller_sleeps_.store(false);
}

void Pool::wake_workers() {
    wakeups_.fetch_add(1);
    wakeups_.notify_all();
}

// True when there are items, false when the pool ends.
bool Pool::await_items() {
    for (;;) {
        int32_t left = 0;
        if (spin_until([&] { return (left = left_.load(std::memory_order_relaxed)) > 0 || left <= kStop; })) {
            return left > 0;
        }
        sleepers_.fetch_add(1);
        const uint32_t wakeups = wakeups_.load();
        if (left = left_.load(); left <= 0 && left > kStop) wakeups_.wait(wakeups);
        sleepers_.fetch_sub(1);
        // And spin again, even if others were faster: the next phase of this step may be about to begin.
    }
}

void Pool::work_loop(int thread) {
    const InsideItem inside;
    while (await_items()) {
        const uint32_t taken = take_items(thread);
        if (taken == 0) continue;
        finished_.fetch_add(taken);
        if (caller_sleeps_.load()) finished_.notify_one();
    }
}

}  // namespace elbowroom
