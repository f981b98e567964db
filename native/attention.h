// Append and attend over strips: checks strips, cuts the step into work items and gives them to the pool.
#pragma once

#include "types.h"

namespace elbowroom {

// Both throw std::invalid_argument when a strip lies outside the range.
void append(const Step& step, const Strips& strips, const Rows& k, const Rows& v);
void attend(const Step& step, const Strips& strips, const Spec& spec, const Rows& q, const Rows& out, float* lse);

}  // namespace elbowroom
