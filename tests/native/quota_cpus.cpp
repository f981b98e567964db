// Prints the CPUs that cgroups allow under a root given as argument; run by tests/unit/test_native_pool.py.

#include <cstdio>

#include "cpus.h"

int main(int, char** argv) { std::printf("%g\n", elbowroom::quota_cpus(argv[1])); }
