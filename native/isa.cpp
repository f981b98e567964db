#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace elbowroom {
namespace {

std::vector<const KernelTable*> supported() {
    std::vector<const KernelTable*> tables{&kernels_baseline};
#if defined(ELBOWROOM_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) tables.push_back(&kernels_avx2);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        tables.push_back(&kernels_avx512);
    }
#if defined(ELBOWROOM_EMULATE)
    // First, so that it is used only when asked for: the lanes of avx512, for tests on CPUs that have half of them.
    if (avx2) tables.insert(tables.begin(), &kernels_emulated512);
#endif
#endif
    return tables;
}

std::atomic<const KernelTable*> current{nullptr};

const KernelTable* find(const std::string& name) {
    std::string names;
    for (const KernelTable* table : supported()) {
        if (name == table->name) return table;
        names += std::string(" ") + table->name;
    }
    throw std::invalid_argument("instruction set '" + name + "' cannot run here; ELBOWROOM_ISA may be one of:" + names);
}

}  // namespace

const KernelTable& kernels() {
    const KernelTable* table = current.load(std::memory_order_acquire);
    if (table == nullptr) {
        const char* wanted = std::getenv("ELBOWROOM_ISA");
        table = wanted != nullptr && *wanted != '\0' ? find(wanted) : supported().back();
        current.store(table, std::memory_order_release);
    }
    return *table;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : supported()) names.emplace_back(table->name);
    return names;
}

void set_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

}  // namespace elbowroom
