#include "cpus.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace elbowroom {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

int affinity_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return int(std::thread::hardware_concurrency());
}

// Version 2: one file "quota period", where quota may be "max".
double quota_of_v2(const std::string& directory) {
    std::ifstream file(directory + "/cpu.max");
    double quota = 0, period = 0;
    return file >> quota >> period && period > 0 ? quota / period : kNoLimit;
}

// Version 1: two files, where a quota of -1 is none.
double quota_of_v1(const std::string& directory) {
    std::ifstream quota_file(directory + "/cpu.cfs_quota_us"), period_file(directory + "/cpu.cfs_period_us");
    double quota = 0, period = 0;
    return quota_file >> quota && period_file >> period && quota > 0 && period > 0 ? quota / period : kNoLimit;
}

// The least quota of a cgroup and all above it. A container may show the path of its host: what is not there limits
// nothing, and the mount itself is the container's own group.
double least_quota(const std::string& mount, std::string path, double (*quota_of)(const std::string&)) {
    double least = quota_of(mount);
    for (; path.size() > 1; path.resize(path.rfind('/'))) least = std::min(least, quota_of(mount + path));
    return least;
}

bool controls_cpus(const std::string& controllers) {
    return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

double quota_cpus(const std::string& root) {
    const std::string mount = root + "/sys/fs/cgroup";
    double least = std::min(quota_of_v2(mount), quota_of_v1(mount + "/cpu"));
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:path; version 2 names no controllers
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos || line.find('/', second) != second + 1) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        if (controllers.empty()) {
            for (const char* place : {"", "/unified"}) least = std::min(least, least_quota(mount + place, path, quota_of_v2));
        } else if (controls_cpus(controllers)) {
            for (const char* place : {"/cpu", "/cpu,cpuacct"}) {
                least = std::min(least, least_quota(mount + place, path, quota_of_v1));
            }
        }
    }
    return least;
}

int usable_threads() {
    double threads = affinity_threads();
    threads = std::min(threads, std::ceil(quota_cpus()));  // 1.5 CPUs are worth 2 threads
    if (const char* wanted = std::getenv("ELBOWROOM_THREADS"); wanted != nullptr && std::atoi(wanted) > 0) {
        threads = std::min(threads, double(std::atoi(wanted)));
    }
    return std::max(int(threads), 1);
}

}  // namespace elbowroom
