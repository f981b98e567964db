// How many threads are worth starting here.
#pragma once

#include <string>

namespace elbowroom {

// Threads this process may use: min(CPU affinity, cgroup quota, ELBOWROOM_THREADS), at least 1.
int usable_threads();

// CPUs that the cgroup of this process and those above it allow it at once, of version 1 or 2; infinity without a
// limit. `root` is what the paths /proc and /sys/fs/cgroup begin with.
double quota_cpus(const std::string& root = "");

}  // namespace elbowroom
