#include "peaks.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "isa.h"
#include "pool.h"

namespace elbowroom {
namespace {

constexpr int64_t kItemBytes = 256 * 1024;
constexpr int64_t kItemRounds = 20000;  // about 50 us
constexpr int64_t kItemsPerThread = 16;
constexpr int64_t kSinkFloats = 16;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Memory of its own, in huge pages where the system has them, all of it resident after `touch`.
class Mapping {
   public:
    explicit Mapping(int64_t num_bytes)
        : num_bytes_(num_bytes),
          base_(mmap(nullptr, size_t(num_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (base_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        madvise(base_, size_t(num_bytes), MADV_HUGEPAGE);  // only advice: small pages measure as well
#endif
    }
    ~Mapping() { munmap(base_, size_t(num_bytes_)); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    int64_t num_items() const { return (num_bytes_ + kItemBytes - 1) / kItemBytes; }
    char* item(int64_t index) const { return static_cast<char*>(base_) + index * kItemBytes; }
    int64_t item_bytes(int64_t index) const { return std::min(kItemBytes, num_bytes_ - index * kItemBytes); }

   private:
    const int64_t num_bytes_;
    void* const base_;
};

void touch_item(void* context, int64_t index, float*) {
    const Mapping& mapping = *static_cast<const Mapping*>(context);
    std::memset(mapping.item(index), 1, size_t(mapping.item_bytes(index)));
}

// Several streams side by side: a core that follows one keeps too few lines in flight (30 instead of 40 GB/s were seen).
// Sums in parts of 16 bytes, which every CPU keeps in registers. Up to 255 bytes at the end of an item are left out.
void read_item(void* context, int64_t index, float* sink) {
    typedef uint64_t Part __attribute__((vector_size(16)));
    constexpr int kStreams = 4, kParts = 4;  // parts of a cache line
    const Mapping& mapping = *static_cast<const Mapping*>(context);
    const char* data = mapping.item(index);
    const int64_t stride = mapping.item_bytes(index) / kStreams / 64 * 64;
    Part sums[kParts] = {};
    for (int64_t line = 0; line < stride; line += 64) {
#pragma GCC unroll 16
        for (int i = 0; i < kStreams * kParts; ++i) {
            Part part;
            std::memcpy(&part, data + i / kParts * stride + line + i % kParts * int64_t{sizeof part}, sizeof part);
            sums[i % kParts] += part;
        }
    }
    std::memcpy(sink, sums, sizeof sums);
}

void multiply_add_item(void* context, int64_t, float* sink) {
    static_cast<const KernelTable*>(context)->multiply_add(kItemRounds, sink);
}

}  // namespace

double read_gb_per_s(int64_t num_bytes, int repeats) {
    if (num_bytes < 1 || repeats < 1) throw std::invalid_argument("num_bytes and repeats must be at least 1");
    Pool& pool = Pool::instance();
    Mapping mapping(num_bytes);
    pool.run(mapping.num_items(), 0, touch_item, &mapping);
    double best = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const auto start = Clock::now();
        pool.run(mapping.num_items(), kSinkFloats, read_item, &mapping);
        best = std::max(best, double(num_bytes) / seconds_since(start) / 1e9);
    }
    return best;
}

double fma_gflop_per_s(int milliseconds) {
    if (milliseconds < 1) throw std::invalid_argument("milliseconds must be at least 1");
    Pool& pool = Pool::instance();
    KernelTable table = kernels();
    float sink[kSinkFloats];
    const int64_t num_items = kItemsPerThread * pool.num_threads();
    const double flop = double(num_items * table.multiply_add(kItemRounds, sink));
    double best = 0;
    for (const auto begin = Clock::now(); best == 0 || seconds_since(begin) * 1e3 < milliseconds;) {
        const auto start = Clock::now();
        pool.run(num_items, kSinkFloats, multiply_add_item, &table);
        best = std::max(best, flop / seconds_since(start) / 1e9);
    }
    return best;
}

}  // namespace elbowroom
