// Which instruction set the kernels use: the best that was compiled and the CPU has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace elbowroom {

// The kernels in use. Throws std::invalid_argument when ELBOWROOM_ISA names a set that cannot run here.
const KernelTable& kernels();

// Names that can run here, the best last.
std::vector<std::string> supported_isas();

// Use the set of that name from now on; not while another thread computes. Throws std::invalid_argument.
void set_isa(const std::string& name);

}  // namespace elbowroom
