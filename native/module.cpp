// The one seam between Python and C++: elbowroom._native. Addresses and strides come in as integers, so nothing here
// knows torch; src/elbowroom/_native.pyi is the typed description and kernels/native.py and kernels/native_sampling.py the only callers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "isa.h"
#include "pool.h"
#include "sampling.h"

namespace nb = nanobind;

namespace elbowroom {
namespace {

using StepTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using StripsTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int, int, int, int>;
using SpecTuple = std::tuple<int, int64_t, float, float>;
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Step to_step(int64_t num_sequences, const StepTuple& t) {
    const auto [row_starts, positions, lengths, first_slots] = t;
    return {num_sequences, pointer<const int32_t>(row_starts), pointer<const int64_t>(positions),
            pointer<const int64_t>(lengths), pointer<const int64_t>(first_slots)};
}

Strips to_strips(const StripsTuple& t) {
    const auto [table, num_blocks, base, num_bytes, dtype, num_kv_heads, head_dim, v_head_dim] = t;
    return {pointer<const uint32_t>(table), num_blocks, pointer<char>(base), num_bytes, DType(dtype), num_kv_heads,
            head_dim, v_head_dim};
}

Rows to_rows(const RowsTuple& t) {
    const auto [data, dtype, row_stride, head_stride] = t;
    return {pointer<char>(data), DType(dtype), row_stride, head_stride};
}

void py_append(int64_t num_sequences, const StepTuple& step, const StripsTuple& strips, const RowsTuple& k,
               const RowsTuple& v) {
    const nb::gil_scoped_release release;
    append(to_step(num_sequences, step), to_strips(strips), to_rows(k), to_rows(v));
}

void py_attend(int64_t num_sequences, const StepTuple& step, const StripsTuple& strips, const SpecTuple& spec,
               const RowsTuple& q, const RowsTuple& out, uintptr_t lse) {
    const nb::gil_scoped_release release;
    const auto [num_q_heads, window, scale, softcap] = spec;
    attend(to_step(num_sequences, step), to_strips(strips), {num_q_heads, window, scale, softcap}, to_rows(q), to_rows(out),
           pointer<float>(lse));
}

std::vector<int64_t> py_sample(uintptr_t logits, int64_t row_stride, int64_t vocab_size, const nb::bytes& draws,
                               const std::vector<uint64_t>& positions) {
    if (draws.size() != positions.size() * sizeof(Draw)) throw std::invalid_argument("one draw and position for each row");
    if (vocab_size < 1 || vocab_size > UINT32_MAX) throw std::invalid_argument("no vocabulary has that size");
    const auto* records = reinterpret_cast<const Draw*>(draws.c_str());
    const nb::gil_scoped_release release;
    return sample(pointer<const float>(logits), row_stride, vocab_size, records, positions);
}

}  // namespace
}  // namespace elbowroom

NB_MODULE(_native, m) {
    using namespace elbowroom;
    m.doc() = "Native kernels of Elbowroom.";
    m.def("append", &py_append, nb::arg("num_sequences"), nb::arg("step"), nb::arg("strips"), nb::arg("k"),
          nb::arg("v"));
    m.def("attend", &py_attend, nb::arg("num_sequences"), nb::arg("step"), nb::arg("strips"), nb::arg("spec"),
          nb::arg("q"), nb::arg("out"), nb::arg("lse"));
    m.def("sample", &py_sample, nb::arg("logits"), nb::arg("row_stride"), nb::arg("vocab_size"), nb::arg("draws"),
          nb::arg("positions"));
    m.def("uniform", &uniform, nb::arg("seed"), nb::arg("sample"), nb::arg("position"));
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("set_isa", &set_isa, nb::arg("name"));
    m.def("supported_isas", &supported_isas);
    m.def("num_threads", [] { return Pool::instance().num_threads(); });
}
