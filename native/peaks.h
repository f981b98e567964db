// What this machine can do at best with all threads of the pool: what a speed is compared with.
#pragma once

#include <cstdint>

namespace elbowroom {

// Read bandwidth over a buffer of num_bytes, the best of `repeats` passes; a buffer far larger than the caches measures
// memory. The buffer is mapped for the measurement. Throws std::invalid_argument or std::bad_alloc.
double read_gb_per_s(int64_t num_bytes, int repeats);

// Float32 multiply-adds in registers with the kernels in use, two operations each: the best of jobs of about a
// millisecond. Throws std::invalid_argument.
double fma_gflop_per_s(int milliseconds);

}  // namespace elbowroom
