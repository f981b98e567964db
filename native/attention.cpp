#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "plan.h"
#include "pool.h"
#include "progressive.h"

namespace elbowroom {
namespace {

constexpr int64_t kAppendRows = 32;  // rows of an append item

void check_start(const Strips& strips, int64_t start) {
    if (start + strips.whole_bytes() > strips.num_bytes) {
        throw std::invalid_argument("strip at byte " + std::to_string(start) + " ends after the " +
                                    std::to_string(strips.num_bytes) + " bytes of its range");
    }
}

struct AttendJob {
    AttendArgs args;
    const KernelTable& kernels;
    Plan& plan;
};

// Merges the pieces of query vector m of a group, always in the order of the strips.
void merge_vector(const AttendJob& job, const Group& group, int64_t m, float* sum) {
    const int64_t width = job.args.strips.v_head_dim;
    const int64_t* parts = job.plan.parts(group);
    const auto piece = [&](int i) { return job.args.partials + (parts[i] + m) * (width + 2); };
    float top = -std::numeric_limits<float>::infinity(), denominator = 0;
    for (int i = 0; i < group.num_parts; ++i) top = std::max(top, piece(i)[width]);
    std::fill(sum, sum + width, 0.0f);
    for (int i = 0; i < group.num_parts; ++i) {
        const float* partial = piece(i);
        if (partial[width + 1] == 0) continue;  // this piece held nothing that the row may read
        const float weight = std::exp(partial[width] - top);
        denominator += weight * partial[width + 1];
        for (int64_t d = 0; d < width; ++d) sum[d] += weight * partial[d];
    }
    const float inverse = denominator > 0 ? 1.0f / denominator : denominator;
    for (int64_t d = 0; d < width; ++d) sum[d] *= inverse;
    const AttendArgs& args = job.args;
    const int64_t row = group.first_row + m / args.group_size();
    const int64_t head = int64_t{group.head} * args.group_size() + m % args.group_size();
    const char* source = reinterpret_cast<const char*>(sum);
    job.kernels.convert(source, DType::float32, args.out.at(row, head), args.out.dtype, width);
    if (args.lse != nullptr) args.lse[row * args.spec.num_q_heads + head] = top + std::log(denominator);
}

void attend_item(void* context, int64_t index, float* scratch) {
    AttendJob& job = *static_cast<AttendJob*>(context);
    const Item& item = job.plan.items()[size_t(index)];
    job.kernels.attend(job.args, item, scratch);
    for (int32_t i = 0; i < item.num_groups; ++i) {
        const int32_t index = job.plan.groups_of(item)[i];
        if (!job.plan.finish_part(index)) continue;
        const Group& group = job.plan.group(index);
        const int64_t vectors = int64_t{group.num_rows} * job.args.group_size();
        for (int64_t m = 0; m < vectors; ++m) merge_vector(job, group, m, scratch);
    }
}

struct AppendJob {
    const Step& step;
    const Strips& strips;
    const Rows &k, &v;
    int64_t num_rows;
};

// Writes a vector, in the given order of its elements, to its slot of the arrays that begin at codes and scales.
void append_vector(const Strips& strips, const RowFormat& format, const char* source, DType dtype, int64_t width,
                   const int16_t* order, int64_t slot, int64_t stride, char* codes, char* scales, float* scratch) {
    codes += slot * stride;
    if (format.kind == RowKind::plain) return kernels().convert(source, dtype, codes, strips.dtype, width);
    kernels().widen(source, dtype, scratch, width);
    if (order != nullptr) {
        float* ordered = scratch + width;
        for (int64_t i = 0; i < width; ++i) ordered[i] = scratch[order[i]];
        scratch = ordered;
    }
    kernels().encode(format, scratch, width, codes, scales + slot * format.scale_stride(width));
}

void append_row(const AppendJob& job, int64_t sequence, int64_t row, float* scratch) {
    const Strips& strips = job.strips;
    const int64_t position = job.step.positions[row], slot = position % kStripTokens;
    char* strip = strips.strip(sequence, position / kStripTokens);
    for (int head = 0; head < strips.num_kv_heads; ++head) {
        append_vector(strips, strips.key, job.k.at(row, head), job.k.dtype, strips.head_dim,
                      strips.order_of(head), slot, strips.key_stride(), strips.keys(strip, head),
                      strips.key_scales(strip, head), scratch);
        append_vector(strips, strips.value, job.v.at(row, head), job.v.dtype, strips.v_head_dim, nullptr,
                      slot, strips.value_stride(), strips.values(strip, head), strips.value_scales(strip, head), scratch);
    }
}

void append_item(void* context, int64_t index, float* scratch) {
    const AppendJob& job = *static_cast<AppendJob*>(context);
    const int32_t* starts = job.step.row_starts;
    const int64_t end = std::min(job.num_rows, (index + 1) * kAppendRows);
    for (int64_t row = index * kAppendRows; row < end; ++row) {
        const int64_t sequence = std::upper_bound(starts, starts + job.step.num_sequences + 1, int32_t(row)) - starts - 1;
        append_row(job, sequence, row, scratch);
    }
}

void check_seals(const LayerStrips& layer) {
    for (int64_t i = 0; i < layer.seals.count; ++i) {
        check_start(layer.open(), layer.seals.from[i] * kUnitBytes);
        check_start(layer.strips, layer.seals.to[i] * kUnitBytes);
    }
}

// Brings the digests of strips that rows were written to up to date. An item is a head of a sequence: nobody else writes
// to its strips.
void digest(const Step& step, const Strips& strips) {
    const int64_t scratch_floats = 5 * padded(strips.head_dim);
    parallel(step.num_sequences * strips.num_kv_heads, scratch_floats, [&](int64_t item, float* scratch) {
        const int64_t s = item / strips.num_kv_heads, end = step.row_starts[s + 1];
        const int head = int(item % strips.num_kv_heads);
        for (int64_t row = step.row_starts[s]; row < end;) {
            const int64_t block = step.positions[row] / kStripTokens;
            int64_t least = kStripTokens, most = -1;
            for (; row < end && step.positions[row] / kStripTokens == block; ++row) {
                least = std::min(least, step.positions[row] % kStripTokens);
                most = std::max(most, step.positions[row] % kStripTokens);
            }
            const int64_t held = std::min(step.lengths[s] - block * kStripTokens, int64_t{kStripTokens});
            char* strip = strips.strip(s, block);
            kernels().digest(strips, strip, head, least, most + 1, held, scratch);
        }
    });
}

// The channels of keys [64][width] that a strip will have, one token behind the other.
template <class T>
void pick_channels(const char* keys, int64_t width, const uint8_t* channels, int64_t count, char* target) {
    const T* source = reinterpret_cast<const T*>(keys);
    T* out = reinterpret_cast<T*>(target);
    for (int64_t t = 0; t < kStripTokens; ++t, source += width) {
        for (int64_t i = 0; i < count; ++i) *out++ = source[channels[i]];
    }
}

// Seals the head of a full strip that has a place in its target; scratch holds its keys and what encoding takes.
void seal_head(const Strips& tail, const Strips& sealed, char* strip, char* target, int head, float* scratch) {
    const int source = sealed.head_at(target, head);
    const char *keys = tail.keys(strip, source), *values = tail.values(strip, source);
    if (const uint8_t* channels = sealed.channels(target, head)) {
        char* picked = reinterpret_cast<char*>(scratch);
        if (size_of(tail.dtype) == 4) {
            pick_channels<uint32_t>(keys, tail.head_dim, channels, sealed.head_dim, picked);
        } else {
            pick_channels<uint16_t>(keys, tail.head_dim, channels, sealed.head_dim, picked);
        }
        keys = picked;
    }
    scratch += kStripTokens * padded(tail.head_dim);
    if (sealed.sealed()) {
        const SealedHead format = sealed.head();
        kernels().seal(format, keys, values, tail.dtype, target + head * format.bytes(), scratch);
        return;
    }
    const int64_t key_bytes = sealed.head_dim * size_of(tail.dtype), value_bytes = tail.v_head_dim * size_of(tail.dtype);
    for (int64_t slot = 0; slot < kStripTokens; ++slot) {
        append_vector(sealed, sealed.key, keys + slot * key_bytes, tail.dtype, sealed.head_dim, nullptr, slot,
                      sealed.key_stride(), sealed.keys(target, head), sealed.key_scales(target, head), scratch);
        append_vector(sealed, sealed.value, values + slot * value_bytes, tail.dtype, sealed.v_head_dim, nullptr, slot,
                      sealed.value_stride(), sealed.values(target, head), sealed.value_scales(target, head), scratch);
    }
}

void seal(const LayerStrips& layer) {
    const Strips &tail = layer.open(), &sealed = layer.strips;
    const int64_t scratch_floats = seal_floats(sealed) + kStripTokens * padded(tail.head_dim);
    for (int64_t i = 0; i < layer.seals.count * sealed.num_kv_heads; ++i) {
        const char* target = sealed.base + layer.seals.to[i / sealed.num_kv_heads] * kUnitBytes;
        const int head = int(i % sealed.num_kv_heads);
        if (sealed.head_at(target, head) >= tail.num_kv_heads) {
            throw std::invalid_argument("a strip names a KV head that its layer does not have");
        }
        const uint8_t* channels = sealed.channels(target, head);
        for (int64_t c = 0; channels != nullptr && c < sealed.head_dim; ++c) {
            if (channels[c] >= tail.head_dim) throw std::invalid_argument("a strip names a channel that keys do not have");
        }
    }
    parallel(layer.seals.count * sealed.num_kv_heads, scratch_floats, [&](int64_t item, float* scratch) {
        const int64_t i = item / sealed.num_kv_heads;
        char* strip = tail.base + layer.seals.from[i] * kUnitBytes;
        char* target = sealed.base + layer.seals.to[i] * kUnitBytes;
        seal_head(tail, sealed, strip, target, int(item % sealed.num_kv_heads), scratch);
    });
}

}  // namespace

const LogTable kLogs;

LogTable::LogTable() {
    for (int i = 0; i < 256; ++i) of[i] = std::log(float(std::max(i, 1)));
}

void check_strip(const Strips& strips, int64_t sequence, int64_t block) {
    const int64_t column = strips.column(sequence, block);
    if (column < 0 || column >= strips.num_blocks) {
        throw std::invalid_argument("block " + std::to_string(block) + " is not in the table of its strips");
    }
    check_start(strips, strips.start(sequence, block));
}

void append(const Step& step, const LayerStrips& layer, const Rows& k, const Rows& v) {
    const Strips& strips = layer.open();
    const int64_t rows = step.row_starts[step.num_sequences];
    for (int64_t s = 0; s < step.num_sequences; ++s) {
        for (int64_t row = step.row_starts[s]; row < step.row_starts[s + 1]; ++row) {
            check_strip(strips, s, step.positions[row] / kStripTokens);
        }
    }
    check_seals(layer);
    AppendJob job{step, strips, k, v, rows};
    const int64_t scratch = strips.plain() ? 0 : 2 * padded(std::max(strips.head_dim, strips.v_head_dim));
    Pool::instance().run((rows + kAppendRows - 1) / kAppendRows, scratch, append_item, &job);
    if (strips.digest_bytes > 0) digest(step, strips);
    if (layer.seals.count > 0) seal(layer);
}

void attend(const Step& step, const LayerStrips& layer, const Spec& spec, const Rows& q, const Rows& out, float* lse) {
    thread_local Plan plan;
    Pool& pool = Pool::instance();
    const Strips* tail = layer.tail ? &*layer.tail : nullptr;
    AttendJob job{{step, layer.strips, tail, layer.open_from, layer.places, spec, q, out, lse, nullptr, nullptr},
                  kernels(), plan};
    plan.build(job.args, layer, pool.num_threads());
    attend_by_planes(job.args, layer.selection);
    job.args.partials = plan.partials();
    job.args.members = plan.members();
    const int64_t vectors = std::max(kItemVectors, job.args.group_size());
    const int64_t scratch = scratch_floats(vectors, job.args);
    pool.run(int64_t(plan.items().size()), scratch, attend_item, &job);
}

}  // namespace elbowroom
