#include "pool.h"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace elbowroom {
namespace {

constexpr int kSpins = 2000;  // about 30 us: longer than the gap between two calls of a layer, shorter than a time slice
constexpr uint64_t kCountMask = 0xffffffffu;

std::atomic<Pool*> current{nullptr};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int affinity_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return int(std::thread::hardware_concurrency());
}

// cgroup v2 "quota period" or v1 files; a quota of 1.5 CPUs counts as 2 threads.
int cgroup_threads(int otherwise) {
    std::string quota;
    double period = 0;
    if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file >> quota >> period && quota != "max" && period > 0) {
        return int(std::ceil(std::atof(quota.c_str()) / period));
    }
    double quota_us = 0;
    std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (v1 >> quota_us && v1_period >> period && quota_us > 0 && period > 0) return int(std::ceil(quota_us / period));
    return otherwise;
}

}  // namespace

int usable_threads() {
    int threads = affinity_threads();
    threads = std::min(threads, cgroup_threads(threads));
    if (const char* wanted = std::getenv("ELBOWROOM_THREADS"); wanted != nullptr && std::atoi(wanted) > 0) {
        threads = std::min(threads, std::atoi(wanted));
    }
    return std::max(threads, 1);
}

Pool& Pool::instance() {
    static std::mutex making;
    Pool* pool = current.load(std::memory_order_acquire);
    if (pool != nullptr) return *pool;
    const std::lock_guard lock(making);
    pool = current.load(std::memory_order_acquire);
    if (pool == nullptr) {
        // Never destroyed: workers sleep until the process ends, and a child after fork() has none to join.
        pool = new Pool(usable_threads());
        current.store(pool, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
        (void)registered;
#endif
    }
    return *pool;
}

Pool::Pool(int num_threads) : num_threads_(num_threads), scratch_(size_t(num_threads)) {
    for (int thread = 1; thread < num_threads; ++thread) std::thread([this, thread] { work_loop(thread); }).detach();
}

void Pool::Free::operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }

void Pool::reserve(int64_t scratch_floats) {
    if (scratch_floats <= scratch_floats_) return;
    const size_t bytes = size_t(scratch_floats) * sizeof(float);
    for (auto& buffer : scratch_) buffer.reset(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    scratch_floats_ = scratch_floats;
}

void Pool::run(int64_t num_items, int64_t scratch_floats, Work work, void* context) {
    if (num_items == 0) return;
    const std::lock_guard lock(mutex_);
    reserve(scratch_floats);
    work_ = work, context_ = context;
    unfinished_.store(uint32_t(num_items), std::memory_order_relaxed);
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32 | uint64_t(num_items), std::memory_order_release);
    if (num_threads_ > 1 && num_items > 1) {
        job_.store(uint32_t(job), std::memory_order_release);
        job_.notify_all();
    }
    while (take(0)) {
    }
    for (int spin = 0; spin < kSpins && unfinished_.load(std::memory_order_acquire) != 0; ++spin) relax();
    for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) unfinished_.wait(left);
}

bool Pool::take(int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
        if ((ticket & kCountMask) == 0) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
    work_(context_, int64_t(ticket & kCountMask) - 1, scratch_[size_t(thread)].get());
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_all();
    return true;
}

void Pool::work_loop(int thread) {
    uint32_t seen = 0;
    for (;;) {
        while (take(thread)) {
        }
        int spin = 0;
        while (spin < kSpins && job_.load(std::memory_order_acquire) == seen) relax(), ++spin;
        if (spin == kSpins) job_.wait(seen);
        seen = job_.load(std::memory_order_acquire);
    }
}

}  // namespace elbowroom
