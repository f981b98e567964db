// The one seam between Python and C++: elbowroom._native. Addresses and strides come in as integers, so nothing here
// knows torch; src/elbowroom/_native.pyi is the typed description; only kernels/native.py, kernels/native_sampling.py
// and models/native.py call it.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "decoder.h"
#include "isa.h"
#include "peaks.h"
#include "pool.h"
#include "product.h"
#include "sampling.h"

namespace nb = nanobind;

namespace elbowroom {
namespace {

using StepTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using RowFormatTuple = std::tuple<int, int, int>;
using StripsTuple =
    std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, int64_t, int, int, int, int, RowFormatTuple, RowFormatTuple,
               int64_t, uintptr_t, int64_t, int64_t, int64_t, bool>;
using SelectionTuple = std::tuple<int64_t, uintptr_t, float, float, uintptr_t>;
using TailTuple = std::tuple<StripsTuple, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;
using SpecTuple = std::tuple<int, int64_t, float, float>;
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int, uintptr_t>;
using VectorTuple = std::tuple<uintptr_t, int64_t>;
using HeadsTuple = std::tuple<int, int, int, int>;
using LayerStepTuple =
    std::tuple<int64_t, StepTuple, StripsTuple, std::optional<TailTuple>, std::optional<SelectionTuple>, bool, bool>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Step to_step(int64_t num_sequences, const StepTuple& t) {
    const auto [row_starts, positions, lengths, first_slots] = t;
    return {num_sequences, pointer<const int32_t>(row_starts), pointer<const int64_t>(positions),
            pointer<const int64_t>(lengths), pointer<const int64_t>(first_slots)};
}

RowFormat to_row_format(const RowFormatTuple& t, int num_kv_heads) {
    const auto [kind, bits, block] = t;
    return {RowKind(kind), bits, block, int64_t{num_kv_heads} * kStripTokens};
}

Strips to_strips(const StripsTuple& t) {
    const auto [table, first_blocks, num_blocks, base, num_bytes, dtype, num_kv_heads, head_dim, v_head_dim, key, value,
                digest_bytes, order, channels_at, counts_at, heads_at, by_token] = t;
    return {pointer<const uint32_t>(table), pointer<const int64_t>(first_blocks), num_blocks, pointer<char>(base),
            num_bytes, DType(dtype), num_kv_heads, head_dim, v_head_dim, to_row_format(key, num_kv_heads),
            to_row_format(value, num_kv_heads), digest_bytes, pointer<const int16_t>(order), channels_at, counts_at,
            heads_at, by_token};
}

LayerStrips to_layer_strips(const StripsTuple& strips, const std::optional<TailTuple>& tail,
                            const std::optional<SelectionTuple>& selection, bool shares) {
    LayerStrips found{to_strips(strips), {}, nullptr, nullptr, {}, {}, shares};
    if (selection) {
        const auto [num_blocks, rows, tau, eps, tally] = *selection;
        found.selection = {num_blocks, pointer<const uint8_t>(rows), tau, eps, pointer<int64_t>(tally)};
    }
    if (tail) {
        const auto& [open, open_from, count, from, to, places] = *tail;
        found.tail = to_strips(open);
        found.open_from = pointer<const int64_t>(open_from);
        found.places = pointer<const int8_t>(places);
        found.seals = {count, pointer<const uint32_t>(from), pointer<const uint32_t>(to)};
    }
    return found;
}

Rows to_rows(const RowsTuple& t) {
    const auto [data, dtype, row_stride, head_stride] = t;
    return {pointer<char>(data), DType(dtype), row_stride, head_stride};
}

Spec to_spec(const SpecTuple& t) {
    const auto [num_q_heads, window, scale, softcap] = t;
    return {num_q_heads, window, scale, softcap};
}

void py_append(int64_t num_sequences, const StepTuple& step, const StripsTuple& strips,
               const std::optional<TailTuple>& tail, const RowsTuple& k, const RowsTuple& v) {
    const nb::gil_scoped_release release;
    append(to_step(num_sequences, step), to_layer_strips(strips, tail, {}, false), to_rows(k), to_rows(v));
}

void py_attend(int64_t num_sequences, const StepTuple& step, const StripsTuple& strips,
               const std::optional<TailTuple>& tail, const std::optional<SelectionTuple>& selection, bool shares,
               const SpecTuple& spec, const RowsTuple& q, const RowsTuple& out, uintptr_t lse) {
    const nb::gil_scoped_release release;
    attend(to_step(num_sequences, step), to_layer_strips(strips, tail, selection, shares), to_spec(spec), to_rows(q),
           to_rows(out), pointer<float>(lse));
}

Matrix to_matrix(const MatrixTuple& t) {
    const auto [data, rows, cols, row_bytes, dtype, bias] = t;
    return {pointer<const char>(data), rows, cols, row_bytes, DType(dtype), pointer<const float>(bias)};
}

std::vector<float> to_vector(const VectorTuple& t) {
    const float* data = pointer<const float>(std::get<0>(t));
    return {data, data + std::get<1>(t)};
}

// The same model as its Python twin; a pass at a time.
Decoder make_decoder(const MatrixTuple& embed, const MatrixTuple& head, const VectorTuple& final_norm, float embed_scale,
                     float eps, float final_softcap, int activation,
                     const std::vector<std::tuple<VectorTuple, float>>& ropes) {
    ModelWeights model{to_matrix(embed), to_matrix(head), to_vector(final_norm), embed_scale, eps, final_softcap,
                       Activation(activation), {}, {}};
    for (const auto& [frequencies, factor] : ropes) model.ropes.push_back({to_vector(frequencies), factor});
    return Decoder(std::move(model));
}

void add_layer(Decoder& decoder, const std::vector<MatrixTuple>& matrices, const std::vector<VectorTuple>& norms,
               const SpecTuple& spec, const HeadsTuple& heads) {
    const auto [num_kv_heads, head_dim, v_head_dim, rope] = heads;
    const auto matrix = [&](size_t i) { return to_matrix(matrices.at(i)); };
    const auto norm = [&](size_t i) { return to_vector(norms.at(i)); };
    decoder.add({matrix(0), matrix(1), matrix(2), matrix(3), matrix(4), matrix(5), matrix(6), norm(0), norm(1), norm(2),
                 norm(3), norm(4), norm(5), to_spec(spec), num_kv_heads, head_dim, v_head_dim, rope});
}

void begin(Decoder& decoder, uintptr_t tokens, uintptr_t positions, int64_t num_tokens,
           const std::vector<uintptr_t>& buffers) {
    const auto buffer = [&](size_t i) { return pointer<float>(buffers.at(i)); };
    const nb::gil_scoped_release release;
    decoder.begin(pointer<const int64_t>(tokens), pointer<const int64_t>(positions), num_tokens,
                  {buffer(0), buffer(1), buffer(2), buffer(3), buffer(4), buffer(5), buffer(6), buffer(7), buffer(8),
                   buffer(9)});
}

void layers(const Decoder& decoder, int64_t first, const std::vector<LayerStepTuple>& steps) {
    const nb::gil_scoped_release release;
    for (const auto& [num_sequences, step, strips, tail, selection, shares, append_kv] : steps) {
        decoder.layer(first++, to_step(num_sequences, step), to_layer_strips(strips, tail, selection, shares), append_kv);
    }
}

void py_multiply(const MatrixTuple& matrix, uintptr_t x, int64_t num_tokens, uintptr_t y) {
    const nb::gil_scoped_release release;
    multiply_rows(to_matrix(matrix), pointer<const float>(x), num_tokens, pointer<float>(y));
}

void logits(const Decoder& decoder, uintptr_t rows, int64_t count, uintptr_t out) {
    const nb::gil_scoped_release release;
    decoder.logits(pointer<const int64_t>(rows), count, pointer<float>(out));
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
    nb::set_leak_warnings(false);  // a program that ends with an open engine is no bug to shout about
    m.def("append", &py_append, nb::arg("num_sequences"), nb::arg("step"), nb::arg("strips"),
          nb::arg("tail").none(), nb::arg("k"), nb::arg("v"));
    m.def("attend", &py_attend, nb::arg("num_sequences"), nb::arg("step"), nb::arg("strips"),
          nb::arg("tail").none(), nb::arg("selection").none(), nb::arg("shares"), nb::arg("spec"), nb::arg("q"),
          nb::arg("out"), nb::arg("lse"));
    m.def("multiply", &py_multiply, nb::arg("matrix"), nb::arg("x"), nb::arg("num_tokens"), nb::arg("y"));
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__",
             [](Decoder* self, const MatrixTuple& embed, const MatrixTuple& head, const VectorTuple& final_norm,
                float embed_scale, float eps, float final_softcap, int activation,
                const std::vector<std::tuple<VectorTuple, float>>& ropes) {
                 new (self) Decoder(
                     make_decoder(embed, head, final_norm, embed_scale, eps, final_softcap, activation, ropes));
             },
             nb::arg("embed"), nb::arg("head"), nb::arg("final_norm"), nb::arg("embed_scale"), nb::arg("eps"),
             nb::arg("final_softcap"), nb::arg("activation"), nb::arg("ropes"))
        .def("add_layer", &add_layer, nb::arg("matrices"), nb::arg("norms"), nb::arg("spec"), nb::arg("heads"))
        .def("begin", &begin, nb::arg("tokens"), nb::arg("positions"), nb::arg("num_tokens"), nb::arg("buffers"))
        .def("layers", &layers, nb::arg("first"), nb::arg("steps"))
        .def("project", &Decoder::project, nb::arg("layer"), nb::call_guard<nb::gil_scoped_release>())
        .def("finish", &Decoder::finish, nb::arg("layer"), nb::call_guard<nb::gil_scoped_release>())
        .def("logits", &logits, nb::arg("rows"), nb::arg("count"), nb::arg("out"));
    m.def("sample", &py_sample, nb::arg("logits"), nb::arg("row_stride"), nb::arg("vocab_size"), nb::arg("draws"),
          nb::arg("positions"));
    m.def("uniform", &uniform, nb::arg("seed"), nb::arg("sample"), nb::arg("position"));
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("set_isa", &set_isa, nb::arg("name"));
    m.def("supported_isas", &supported_isas);
    m.def("num_threads", [] { return Pool::instance().num_threads(); });
    m.def("read_gb_per_s", &read_gb_per_s, nb::arg("num_bytes"), nb::arg("repeats"),
          nb::call_guard<nb::gil_scoped_release>());
    m.def("fma_gflop_per_s", &fma_gflop_per_s, nb::arg("milliseconds"), nb::call_guard<nb::gil_scoped_release>());
}
