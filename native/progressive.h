// Rows that read keys plane by plane, and values where they matter (kernels/base.py: Progress).
#pragma once

#include "attention.h"
#include "kernels.h"

namespace elbowroom {

// Attends for the rows that `selection` marks so. Throws std::invalid_argument when a strip lies outside its range.
void attend_by_planes(const AttendArgs& args, const Selection& selection);

}  // namespace elbowroom
