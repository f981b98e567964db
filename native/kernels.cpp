// Attention of one work item, compiled once for each instruction set (ELBOWROOM_KERNELS names the table).
//
// An item is M query vectors (a few rows x the query heads of one KV head) against consecutive strips; each strip is
// read once. Up to kFewVectors vectors, keys and values are used where they lie: the item is bound by bytes. Above, K
// and V are packed into panels and both products run in register tiles: the item is bound by arithmetic.
// Legend: G query heads of a KV head, M = rows * G, W lanes of a vector, Dk/Dv widths.

#include "coded_kernels.h"
#include "digest_kernels.h"
#include "kernels.h"
#include "layer_kernels.h"
#include "matmul_kernels.h"
#include "peak_kernels.h"
#include "plane_kernels.h"
#include "row_formats.h"
#include "sealed_kernels.h"
#include "simd.h"
#include "tile.h"

namespace {

using namespace elbowroom;

constexpr int kFewVectors = 8;
constexpr int kPanel = 2 * W;                   // columns of a register tile
constexpr int kTileRows = W == 16 ? 12 : 6;     // rows of a register tile: what 32 or 16 registers hold
constexpr float kNegInf = -__builtin_inff();

inline void prefetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// All M rows against one panel of NV vectors.
template <int NV>
inline void panel(int64_t M, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t depth, bool accumulate) {
    for (int64_t m = 0; m < M; m += kTileRows) {
        tile_rows<NV, kTileRows>(min(kTileRows, M - m), a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth, accumulate);
    }
}

// One item being worked on; T is the storage type of the strips.
template <class T>
class Attention {
   public:
    Attention(const AttendArgs& args, const Item& item, float* scratch)
        : args_(args),
          item_(item),
          group_(args.group_size()),
          M_(int64_t{item.num_rows} * group_),
          strips_(args.open_strips()),
          Dk_(strips_.head_dim),
          Dv_(strips_.v_head_dim),
          ldk_(round_up(Dk_, kPanel)),
          ldv_(round_up(Dv_, kPanel)),
          key_step_(key_step(strips_)),
          value_step_(value_step(strips_)),
          head_(item.head) {
        q_ = scratch;
        out_ = q_ + M_ * ldk_;
        scores_ = out_ + M_ * ldv_;
        keys_ = scores_ + M_ * kStripTokens;
        values_ = keys_ + kStripTokens * ldk_;
        max_ = values_ + kStripTokens * ldv_;
        sum_ = max_ + M_;
        open_keys_ = sum_ + M_;
        open_values_ = open_keys_ + kStripTokens * Dk_;
        integer_scratch_ = strips_.decoded() ? open_values_ + kStripTokens * Dv_ : open_keys_;
        whole_q_ = integer_scratch_ + integer_floats(M_, args);
        picked_q_ = whole_q_ + M_ * padded(Dk_);
    }

    void run() {
        begin();
        if (args_.tail != nullptr && args_.strips.sealed()) read_sealed();
        if (args_.tail != nullptr && args_.strips.coded()) read_sealed_codes();
        if (strips_.coded()) return read_coded(), write();
        if (args_.strips.channels_at != 0) __builtin_memcpy(whole_q_, q_, M_ * ldk_ * sizeof(float));
        if constexpr (std::is_same_v<T, bf16>) {
            if (M_ <= kFewVectors) arrange_few();
        }
        if (args_.tail != nullptr && args_.strips.plain()) {
            Attention(*this, args_.strips.channels_at != 0 ? picked_q_ : q_).read_sealed_rows(*this);
        }
        for (int64_t block = max(item_.first_block, low_ / kStripTokens); block < item_.end_block; ++block) {
            const int64_t start = block * kStripTokens;
            const int64_t low = max(0, low_ - start), high = min(kStripTokens, high_ + 1 - start);
            if (low < high) read_open(block, low, high);
        }
        if (M_ <= kFewVectors) finish_few();
        write();
    }

   private:
    // The sealed strips of an item whose new tokens lie in others of the same type.
    Attention(const Attention& whole, float* q)
        : args_(whole.args_),
          item_(whole.item_),
          group_(whole.group_),
          M_(whole.M_),
          strips_(whole.args_.strips),
          Dk_(strips_.head_dim),
          Dv_(strips_.v_head_dim),
          ldk_(round_up(Dk_, kPanel)),
          ldv_(whole.ldv_),
          key_step_(key_step(strips_)),
          value_step_(value_step(strips_)),
          head_(item_.place),
          is_sealed_(true) {
        q_ = q, out_ = whole.out_, scores_ = whole.scores_, keys_ = whole.keys_, values_ = whole.values_;
        max_ = whole.max_, sum_ = whole.sum_, open_keys_ = whole.open_keys_, open_values_ = whole.open_values_;
    }

    // The block behind the sealed ones that any row reads.
    int64_t sealed_end() const {
        int64_t end = 0;
        for (int r = 0; r < item_.num_rows; ++r) end = max(end, first_open(r));
        return min(item_.end_block, end);
    }

    // Queries with the channels that the keys of a strip have; returns whether they are others than before.
    bool pick_channels(const char* strip, int64_t stride) {
        const uint8_t* channels = args_.strips.channels(strip, item_.place);
        const int64_t count = args_.strips.head_dim, width = round_up(count, kPanel);
        if (channels == nullptr) return false;
        if (channels_ != nullptr && __builtin_memcmp(channels_, channels, count) == 0) return false;
        channels_ = channels;
        for (int64_t m = 0; m < M_; ++m) {
            for (int64_t i = 0; i < count; ++i) picked_q_[m * width + i] = whole_q_[m * stride + channels[i]];
            for (int64_t i = count; i < width; ++i) picked_q_[m * width + i] = 0;
        }
        return true;
    }

    Gathered sealed_rows() {
        const int64_t width = args_.strips.head_dim;
        if (args_.strips.channels_at == 0) return {Dk_, Dv_, ldk_, ldv_, q_, out_, max_, sum_};
        __builtin_memcpy(whole_q_, q_, M_ * ldk_ * sizeof(float));
        return {width, Dv_, round_up(width, kPanel), ldv_, picked_q_, out_, max_, sum_};
    }

    // Slots of a sealed strip that a query vector reads.
    Slots sealed_slots(int64_t m, int64_t block) const {
        const int r = int(m / group_);
        const int64_t low = max(0, in_window(r) - block * kStripTokens);
        return {min(low, kStripTokens), block < first_open(r) ? kStripTokens : 0};
    }

    // Sealed strips of integer codes that lie token by token.
    void read_sealed_codes() {
        const int64_t first = item_.first_block, end = sealed_end();
        if (first >= end) return;
        const Gathered rows = sealed_rows();
        pick_channels(stored_strip(first), ldk_);
        CodedStrips strips(args_.strips, item_.place, args_.spec.softcap, rows, M_, integer_scratch_);
        strips.load_queries(M_);
        for (int64_t block = first; block < end; ++block) {
            if (pick_channels(stored_strip(block), ldk_)) strips.load_queries(M_);
            strips.open(stored_strip(block), block + 1 < end ? stored_strip(block + 1) : nullptr);
            strips.attend(M_, [&](int64_t m) { return sealed_slots(m, block); });
        }
        strips.finish(M_);
    }

    // Sealed strips of numbers as they are; `whole` holds the queries.
    void read_sealed_rows(Attention& whole) {
        end_block_ = whole.sealed_end();
        for (int64_t block = item_.first_block; block < end_block_; ++block) {
            if (whole.pick_channels(stored_strip(block), whole.ldk_)) {
                if constexpr (std::is_same_v<T, bf16>) {
                    if (M_ <= kFewVectors) arrange(q_, M_ * ldk_);
                }
            }
            int64_t low = kStripTokens;
            for (int r = 0; r < item_.num_rows; ++r) low = min(low, max(0, in_window(r) - block * kStripTokens));
            if (low < kStripTokens) read_open(block, low, kStripTokens);
        }
    }

    void write() const { return item_.partial >= 0 ? write_partials() : write_rows(); }

    // Strips of integer codes, which are multiplied as such.
    void read_coded() {
        const Gathered rows{Dk_, Dv_, ldk_, ldv_, q_, out_, max_, sum_};
        CodedStrips strips(strips_, head_, args_.spec.softcap, rows, M_, integer_scratch_);
        strips.load_queries(M_);
        const int64_t end = min(item_.end_block, high_ / kStripTokens + 1);
        for (int64_t block = max(item_.first_block, low_ / kStripTokens); block < end; ++block) {
            const int64_t start = block * kStripTokens;
            strips.open(open_strip(block), block + 1 < end ? open_strip(block + 1) : nullptr);
            strips.attend(M_, [&](int64_t m) {
                const int r = int(m / group_);
                return Slots{first_visible(r) - start, last_visible(r) + 1 - start};
            });
        }
        strips.finish(M_);
    }

    // Slots low .. high - 1 of a block whose tokens lie one by one.
    void read_open(int64_t block, int64_t low, int64_t high) {
        char* strip = open_strip(block);
        const T* keys = reinterpret_cast<const T*>(strips_.keys(strip, head_));
        const T* values = reinterpret_cast<const T*>(strips_.values(strip, head_));
        const bool packed = std::is_same_v<T, f16> && strips_.decoded();
        if (packed) keys = opened(strip, true, low, high);
        if (M_ <= kFewVectors) {
            score_few(keys, strips_.values(strip, head_), low, high);
        } else {
            score_many(keys, low, high);
        }
        softmax(block * kStripTokens, strips_.counts(strip, head_));
        if (packed) values = opened(strip, false, low, high);
        if (M_ <= kFewVectors) {
            const bool last = block + 1 == (is_sealed_ ? end_block_ : item_.end_block);
            weigh_few(values, last ? nullptr : strips_.keys(open_strip(block + 1), head_), low, high);
        } else {
            weigh_many(values, low, high);
        }
    }

    // The blocks before those that a row reads in the tail.
    void read_sealed() {
        const Strips& strips = args_.strips;
        const Gathered rows = sealed_rows();
        const int64_t head_bytes = strips.head().bytes();
        const auto head = [&](int64_t block) { return stored_strip(block) + item_.place * head_bytes; };
        const int64_t end = sealed_end();
        for (int64_t block = item_.first_block; block < end; ++block) {
            const char* next = block + 1 < end ? head(block + 1) : nullptr;
            pick_channels(stored_strip(block), ldk_);
            const uint8_t* counts = strips.counts(stored_strip(block), item_.place);
            SealedStrip strip(strips, head(block), next, args_.spec.softcap, counts);
            for (int64_t first = 0; first < M_; first += kSealedRows) {
                const int64_t count = min(kSealedRows, M_ - first);
                int64_t low[kSealedRows], high[kSealedRows];
                for (int64_t m = 0; m < count; ++m) {
                    const Slots slots = sealed_slots(first + m, block);
                    low[m] = slots.low, high[m] = slots.high;
                }
                strip.attend(rows, first, count, low, high, integer_scratch_);
            }
        }
    }

    // Query vectors in float32, scaled, padded with zeros; the slots that any row of the item reads.
    void begin() {
        low_ = INT64_MAX, high_ = -1;
        for (int r = 0; r < item_.num_rows; ++r) {
            low_ = min(low_, first_visible(r));
            high_ = max(high_, last_visible(r));
            for (int g = 0; g < group_; ++g) {
                const char* row = args_.q.at(row_of(r), int64_t{item_.head} * group_ + g);
                float* target = q_ + (r * group_ + g) * ldk_;
                load_query(row, target);
                if (strips_.order != nullptr) order_channels(strips_.order_of(item_.head), target);
            }
        }
        for (int64_t i = 0; i < M_ * ldv_; ++i) out_[i] = 0;
        for (int64_t m = 0; m < M_; ++m) max_[m] = kNegInf, sum_[m] = 0;
    }

    // Queries and sums in the order of widen_first and widen_second.
    void arrange_few() const {
        arrange(q_, M_ * ldk_);
        if (args_.tail != nullptr) arrange(out_, M_ * ldv_);
    }

    static void arrange(float* rows, int64_t count) {
        for (int64_t i = 0; i < count; i += kPanel) {
            vf first = load<vf>(rows + i), second = load<vf>(rows + i + W);
            deinterleave(first, second);
            store(rows + i, first);
            store(rows + i + W, second);
        }
    }

    // A query in the order in which the channels of keys lie.
    void order_channels(const int16_t* order, float* query) const {
        for (int64_t d = 0; d < Dk_; ++d) keys_[d] = query[order[d]];
        __builtin_memcpy(query, keys_, Dk_ * sizeof(float));
    }

    void load_query(const char* row, float* target) const {
        switch (args_.q.dtype) {
            case DType::float32: return load_query_of<float>(row, target);
            case DType::bfloat16: return load_query_of<bf16>(row, target);
            case DType::float16: return load_query_of<f16>(row, target);
        }
    }

    template <class Q>
    void load_query_of(const char* row, float* target) const {
        for (int64_t d = 0; d < ldk_; d += W) {
            store(target + d, widen_padded(reinterpret_cast<const Q*>(row), d, Dk_) * (args_.spec.scale * unit()));
        }
    }

    // A block in the strips of the layer, and one of those that take new tokens.
    char* stored_strip(int64_t block) const {
        const Strips& strips = args_.strips;
        return item_.selected == nullptr ? strips.strip(item_.sequence, block)
                                         : strips.base + item_.selected[block] * kUnitBytes;
    }
    char* open_strip(int64_t block) const {
        return args_.tail == nullptr || is_sealed_ ? stored_strip(block) : strips_.strip(item_.sequence, block + item_.num_hidden);
    }

    // Numbers that are not decoded lie apart as their bytes say; decoded ones one behind the other.
    static int64_t key_step(const Strips& strips) {
        return strips.by_token ? strips.key_stride() / int64_t{sizeof(T)} : strips.head_dim;
    }
    static int64_t value_step(const Strips& strips) {
        return strips.by_token ? strips.value_stride() / int64_t{sizeof(T)} : strips.v_head_dim;
    }

    // Slots are counted as if blocks that the item does not read were not there.
    int64_t hidden() const { return item_.num_hidden * kStripTokens; }

    int64_t row_of(int64_t r) const {
        return item_.first_member < 0 ? item_.first_row + r : args_.members[item_.first_member + r].row;
    }
    int64_t sequence_of(int r) const {
        return item_.first_member < 0 ? item_.sequence : args_.members[item_.first_member + r].sequence;
    }

    int64_t position(int r) const { return args_.step.positions[row_of(r)] - hidden(); }

    int64_t first_open(int r) const { return args_.first_open(sequence_of(r), position(r)); }

    int64_t in_window(int r) const {
        const int64_t first = item_.selected == nullptr ? args_.step.first_slots[sequence_of(r)] : 0;
        return args_.spec.window > 0 ? max(first, position(r) - args_.spec.window + 1) : first;
    }

    // Of the strips that are not sealed.
    int64_t first_visible(int r) const {
        if (is_sealed_) return in_window(r);
        return args_.tail == nullptr ? in_window(r) : max(in_window(r), first_open(r) * kStripTokens);
    }

    int64_t last_visible(int r) const {
        const int64_t last = min(position(r), args_.step.lengths[sequence_of(r)] - hidden() - 1);
        return is_sealed_ ? min(last, first_open(r) * kStripTokens - 1) : last;
    }

    // What stored numbers must be multiplied with.
    float unit() const { return strips_.decoded() ? kFp8Unit : 1.0f; }

    // Keys or values of a strip in float16, for the one tile that is being worked on.
    const T* opened(char* strip, bool is_keys, int64_t low, int64_t high) const {
        const Strips& strips = strips_;
        const int64_t width = is_keys ? Dk_ : Dv_, first = low / kPanel * kPanel, count = round_up(high, kPanel) - first;
        const char* codes = is_keys ? strips.keys(strip, head_) : strips.values(strip, head_);
        f16* rows = reinterpret_cast<f16*>(is_keys ? open_keys_ : open_values_);
        fp8_to_halves(codes + first * width, count * width, rows + first * width);
        return reinterpret_cast<const T*>(rows);
    }

    // W keys at a time, widened once for all query vectors.
    void score_few(const T* keys, const char* values, int64_t low, int64_t high) {
        const int64_t value_bytes = strips_.value.code_bytes(Dv_), ahead_bytes = W * value_bytes / M_;
        const bool apart = strips_.by_token;
        const char* ahead = apart ? values : values + low * value_bytes;
        for (int64_t key = low / W * W; key < high; key += W) {
            const float* rows = widen_keys(keys + key * key_step_);
            const int64_t stride = rows == keys_ ? ldk_ : key_step_;
            if (apart) {
                for (int64_t i = key; i < key + W; ++i) prefetch(ahead + i * value_step_ * int64_t{sizeof(T)}, value_bytes);
            }
            for (int64_t m = 0; m < M_; ++m) {
                if (!apart) prefetch(ahead + m * ahead_bytes, ahead_bytes);
                vf dots[W] = {};
#pragma GCC unroll 2
                for (int64_t d = 0; d < ldk_; d += W) {
                    const vf q = load<vf>(q_ + m * ldk_ + d);
#pragma GCC unroll 16
                    for (int i = 0; i < W; ++i) dots[i] += q * load<vf>(rows + i * stride + d);
                }
                store(scores_ + m * kStripTokens + key, sum_each(dots));
            }
            if (!apart) ahead += M_ * ahead_bytes;
        }
    }

    // W keys in float32; those that are and fill whole panels stay where they are.
    const float* widen_keys(const T* keys) const {
        if constexpr (std::is_same_v<T, float>) {
            if (Dk_ % kPanel == 0) return keys;
        }
        for (int64_t i = 0; i < W; ++i) widen_key(keys + i * key_step_, keys_ + i * ldk_);
        return keys_;
    }

    // Columns in the order of widen_first and widen_second, as `begin` laid out the queries.
    void widen_key(const T* key, float* out) const {
        int64_t d = 0;
        for (; d + kPanel <= Dk_; d += kPanel) {
            store(out + d, widen_first(key + d));
            store(out + d + W, widen_second(key + d));
        }
        if (d == Dk_) return;
        T tail[kPanel] = {};
        __builtin_memcpy(tail, key + d, (Dk_ - d) * sizeof(T));
        store(out + d, widen_first(tail));
        store(out + d + W, widen_second(tail));
    }

    // Sums in the order of widen_first and widen_second (see `finish_few`), two vectors of columns at a time.
    void weigh_few(const T* values, const char* next, int64_t low, int64_t high) {
        const int64_t key_bytes = kStripTokens * strips_.key.code_bytes(Dk_);
        const bool apart = strips_.by_token;
        const int64_t lines = next == nullptr ? 0 : apart ? kStripTokens : key_bytes * kPanel / ldv_ / 64;
        const int64_t step = apart ? strips_.key_stride() : 64;
        for (int64_t d = 0; d < Dv_; d += kPanel, next += apart ? kPanel * int64_t{sizeof(T)} : lines * 64) {
            const T* rows = values + low * value_step_ + d;
            int64_t stride = value_step_;
            T tail[kStripTokens * kPanel];
            if (d + kPanel > Dv_) {
                rows = pad_rows(rows, high - low, tail);
                stride = kPanel;
            }
            for_groups(M_, [&](int64_t m, int64_t vectors) {
                weigh_group(vectors, scores_ + m * kStripTokens + low, rows, stride, high - low, out_ + m * ldv_ + d,
                            next, m == 0 ? lines : 0, step);
            });
        }
    }

    // The last columns of rows that do not fill a panel.
    const T* pad_rows(const T* rows, int64_t count, T* padded) const {
        const int64_t columns = Dv_ % kPanel;
        for (int64_t i = 0; i < count; ++i) {
            __builtin_memcpy(padded + i * kPanel, rows + i * value_step_, columns * sizeof(T));
            __builtin_memset(padded + i * kPanel + columns, 0, (kPanel - columns) * sizeof(T));
        }
        return padded;
    }

    template <int M = kMostTokens>
    void weigh_group(int64_t vectors, const float* weights, const T* rows, int64_t stride, int64_t slots, float* out,
                     const char* next, int64_t lines, int64_t step) {
        if constexpr (M > 1) {
            if (vectors < M) return weigh_group<M - 1>(vectors, weights, rows, stride, slots, out, next, lines, step);
        }
        vf sum[2 * M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            sum[2 * m] = load<vf>(out + m * ldv_);
            sum[2 * m + 1] = load<vf>(out + m * ldv_ + W);
        }
        int64_t line = 0;
#pragma GCC unroll 2
        for (int64_t slot = 0; slot < slots; ++slot) {
            if (line < lines) __builtin_prefetch(next + step * line++, 0, 2);
            const vf first = widen_first(rows + slot * stride), second = widen_second(rows + slot * stride);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const vf weight = splat(weights[m * kStripTokens + slot]);
                sum[2 * m] += weight * first;
                sum[2 * m + 1] += weight * second;
            }
        }
        for (; line < lines; ++line) __builtin_prefetch(next + step * line, 0, 2);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            store(out + m * ldv_, sum[2 * m]);
            store(out + m * ldv_ + W, sum[2 * m + 1]);
        }
    }

    // Puts the sums into the order of their columns.
    void finish_few() {
        if constexpr (std::is_same_v<T, bf16>) {
            for (int64_t i = 0; i < M_ * ldv_; i += kPanel) {
                vf first = load<vf>(out_ + i), second = load<vf>(out_ + i + W);
                interleave(first, second);
                store(out_ + i, first);
                store(out_ + i + W, second);
            }
        }
    }

    // Keys transposed into panels [64 / kPanel][Dk][kPanel], then one register tile after the other.
    void score_many(const T* keys, int64_t low, int64_t high) {
        for (int64_t column = low / kPanel * kPanel; column < high; column += kPanel) {
            float* packed = keys_ + column * ldk_;
            for (int64_t half = 0; half < kPanel; half += W) pack_keys(keys + (column + half) * key_step_, packed + half);
            panel<2>(M_, q_, ldk_, packed, kPanel, scores_ + column, kStripTokens, Dk_, false);
        }
    }

    void pack_keys(const T* keys, float* packed) const {
        for (int64_t d = 0; d < Dk_; d += W) {
            vf rows[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) rows[i] = widen_padded(keys + i * key_step_, d, Dk_);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(packed + (d + i) * kPanel, rows[i]);
        }
    }

    // Values in panels [Dv / kPanel][64][kPanel].
    void weigh_many(const T* values, int64_t low, int64_t high) {
        for (int64_t d = 0; d < Dv_; d += kPanel) {
            float* packed = values_ + d * kStripTokens;
            for (int64_t slot = low; slot < high; ++slot) {
                store(packed + slot * kPanel, widen_padded(values + slot * value_step_, d, Dv_));
                store(packed + slot * kPanel + W, widen_padded(values + slot * value_step_, d + W, Dv_));
            }
            panel<2>(M_, scores_ + low, kStripTokens, packed + low * kPanel, kPanel, out_ + d, ldv_, high - low, true);
        }
    }

    // Scores become weights exp(score - maximum); what a row may not read becomes 0, whatever was there.
    void softmax(int64_t start, const uint8_t* counts) {
        for (int64_t m = 0; m < M_; ++m) {
            const int r = int(m / group_);
            float* scores = scores_ + m * kStripTokens;
            const int64_t low = max(0, first_visible(r) - start);
            const int64_t high = min(kStripTokens, last_visible(r) + 1 - start);
            if (low >= high) {
                for (int i = 0; i < kStripTokens; ++i) scores[i] = 0;
                continue;
            }
            cap(scores);
            if (counts != nullptr) add_counts(scores, counts);
            for (int64_t i = 0; i < low; ++i) scores[i] = kNegInf;
            for (int64_t i = high; i < kStripTokens; ++i) scores[i] = kNegInf;
            merge_row(m, scores);
        }
    }

    void cap(float* scores) const {
        const float softcap = args_.spec.softcap;
        if (softcap <= 0) return;
        for (int i = 0; i < kStripTokens; i += W) store(scores + i, vtanh(load<vf>(scores + i) / softcap) * softcap);
    }

    void merge_row(int64_t m, float* scores) {
        vf tops = load<vf>(scores);
        for (int i = W; i < kStripTokens; i += W) tops = vmax(tops, load<vf>(scores + i));
        const float top = max_lane(tops);
        if (top > max_[m]) {
            const float rescale = exp_one(max_[m] - top);
            for (int64_t d = 0; d < ldv_; d += W) store(out_ + m * ldv_ + d, load<vf>(out_ + m * ldv_ + d) * rescale);
            sum_[m] *= rescale;
            max_[m] = top;
        }
        vf sums{};
        for (int i = 0; i < kStripTokens; i += W) {
            const vf weights = vexp(load<vf>(scores + i) - max_[m]);
            sums += weights;
            store(scores + i, weights);
        }
        sum_[m] += sum_lanes(sums);
    }

    void write_partials() const {
        for (int64_t m = 0; m < M_; ++m) {
            float* target = args_.partials + (item_.partial + m) * (Dv_ + 2);
            for (int64_t d = 0; d < Dv_; ++d) target[d] = out_[m * ldv_ + d] * unit();
            target[Dv_] = max_[m];
            target[Dv_ + 1] = sum_[m];
        }
    }

    void write_rows() const {
        for (int64_t m = 0; m < M_; ++m) {
            const int64_t row = row_of(m / group_), head = int64_t{item_.head} * group_ + m % group_;
            const float inverse = sum_[m] > 0 ? unit() / sum_[m] : sum_[m];
            float* result = out_ + m * ldv_;
            for (int64_t d = 0; d < ldv_; d += W) store(result + d, load<vf>(result + d) * inverse);
            store_row(result, args_.out.at(row, head));
            if (args_.lse != nullptr) {
                args_.lse[row * args_.spec.num_q_heads + head] = max_[m] + __builtin_logf(sum_[m]);
            }
        }
    }

    void store_row(const float* row, char* target) const {
        convert(reinterpret_cast<const char*>(row), DType::float32, target, args_.out.dtype, Dv_);
    }

    const AttendArgs& args_;
    const Item& item_;
    const int group_;
    const int64_t M_;
    const Strips& strips_;
    const int64_t Dk_, Dv_, ldk_, ldv_;
    const int64_t key_step_, value_step_;  // elements from one token to the next
    const int head_;                // in strips_
    const bool is_sealed_ = false;  // these are the sealed strips of an item
    int64_t end_block_ = 0;         // of those
    const uint8_t* channels_ = nullptr;  // whose queries are picked
    int64_t low_, high_;
    float *q_, *out_, *scores_, *keys_, *values_, *max_, *sum_, *open_keys_, *open_values_, *integer_scratch_, *whole_q_, *picked_q_;
};

void attend(const AttendArgs& args, const Item& item, float* scratch) {
    if (args.open_strips().coded()) return Attention<float>(args, item, scratch).run();
    if (args.open_strips().decoded()) return Attention<f16>(args, item, scratch).run();
    switch (args.open_strips().dtype) {
        case DType::float32: return Attention<float>(args, item, scratch).run();
        case DType::bfloat16: return Attention<bf16>(args, item, scratch).run();
        case DType::float16: return Attention<f16>(args, item, scratch).run();
    }
}

#define ELBOWROOM_TEXT(x) #x
#define ELBOWROOM_NAME(x) ELBOWROOM_TEXT(x)

}  // namespace

namespace elbowroom {

extern const SamplingTable ELBOWROOM_SAMPLING;
extern const KernelTable ELBOWROOM_TABLE;
const KernelTable ELBOWROOM_TABLE = {
    .name = ELBOWROOM_NAME(ELBOWROOM_ISA),
    .sampling = ELBOWROOM_SAMPLING,
    .attend = attend,
    .score_plane = score_plane,
    .gather_read = gather_read,
    .seal = seal,
    .digest = digest,
    .bound = bound,
    .encode = encode_row,
    .convert = convert,
    .widen = widen_row,
    .arrange = arrange,
    .dot = dot,
    .multiply = multiply,
    .rms_norm = rms_norm,
    .rms_norm_panel = rms_norm_panel,
    .gate = gate,
    .rotate = rotate,
    .softcap = softcap,
    .to_panel = to_panel,
    .to_rows = to_rows,
    .multiply_add = multiply_add,
};

}  // namespace elbowroom
