// Work items on the pool, as a lambda.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "pool.h"

namespace elbowroom {

inline int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// Calls work(item, scratch) for every item; scratch is the thread's own.
template <class F>
void parallel(int64_t num_items, int64_t scratch_floats, F&& work) {
    kernels();  // an instruction set that cannot run here throws on this thread: nobody could catch it on another
    using Work = std::remove_reference_t<F>;
    const auto call = [](void* context, int64_t item, float* scratch) { (*static_cast<Work*>(context))(item, scratch); };
    Pool::instance().run(num_items, scratch_floats, call, &work);
}

}  // namespace elbowroom
