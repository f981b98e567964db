#include "progressive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace elbowroom {
namespace {

constexpr int64_t kPieceBlocks = 16;          // of an item; fixed, so results do not depend on threads
constexpr int64_t kMostScores = int64_t{1} << 18;  // of rows that are worked on together, unless one alone has more

struct Piece {
    int32_t row, head;
    int64_t first, end;  // blocks of the row
};

// Where the softmax of a query head stands.
struct Total {
    float top, denominator;
};

// Rows that are worked on together; buffers live as long as the calling thread, so a steady state allocates nothing.
class PlaneRows {
   public:
    void run(const AttendArgs& args, const Selection& selection) {
        for (int64_t s = 0; s < args.step.num_sequences;) {
            rows_.clear(), pieces_.clear();
            int64_t blocks = 0;
            const int64_t block_scores = args.spec.num_q_heads * int64_t{kStripTokens};
            for (; s < args.step.num_sequences; ++s) {
                if (!selection.by_planes(s)) continue;
                const PlaneRow row = row_of(args, s);
                if (!rows_.empty() && (blocks + row.num_blocks) * block_scores > kMostScores) break;
                blocks += row.num_blocks;
                rows_.push_back(row);
            }
            if (!rows_.empty()) attend(args, selection, blocks);
        }
    }

   private:
    static PlaneRow row_of(const AttendArgs& args, int64_t sequence) {
        const Step& step = args.step;
        const int64_t row = step.row_starts[sequence], low = step.first_slots[sequence];
        const int64_t last = std::min(step.positions[row], step.lengths[sequence] - 1), first = low / kStripTokens;
        const PlaneRow found{sequence, row, low, last + 1, first, last / kStripTokens - first + 1, nullptr, nullptr, nullptr};
        for (int64_t b = 0; b < found.num_blocks; ++b) check_strip(args.strips, sequence, first + b);
        return found;
    }

    void attend(const AttendArgs& args, const Selection& selection, int64_t blocks) {
        lay_out(args, blocks);
        const int64_t group = args.group_size(), heads = args.strips.num_kv_heads;
        const int64_t scratch = plane_floats(group, args.strips), num_heads = int64_t(rows_.size()) * heads;
        const auto score = [&](bool low) {
            parallel(int64_t(pieces_.size()), scratch, [&](int64_t i, float* floats) {
                const Piece& piece = pieces_[size_t(i)];
                if (low && !flat_[size_t(piece.row * heads + piece.head)]) return;
                kernels().score_plane(args, rows_[size_t(piece.row)], piece.head, piece.first, piece.end, low, floats);
            });
            parallel(num_heads, group * (most_blocks_ + 1), [&](int64_t i, float* floats) {
                if (low && !flat_[size_t(i)]) return;
                const bool flat = settle(args, selection, i, floats);
                if (!low) flat_[size_t(i)] = flat;
            });
        };
        score(false);
        if (std::find(flat_.begin(), flat_.end(), 1) != flat_.end()) score(true);
        if (selection.tally != nullptr) count(args, selection.tally);
        const int64_t width = args.strips.v_head_dim;
        parallel(int64_t(pieces_.size()), scratch, [&](int64_t i, float* floats) {
            const Piece& piece = pieces_[size_t(i)];
            float* partial = partials_.data() + i * group * width;
            kernels().gather_read(args, rows_[size_t(piece.row)], piece.head, piece.first, piece.end, partial, floats);
        });
        parallel(num_heads, width, [&](int64_t i, float* floats) { merge(args, i, floats); });
    }

    // Cuts the rows into pieces and gives them their buffers.
    void lay_out(const AttendArgs& args, int64_t blocks) {
        const int64_t group = args.group_size(), heads = args.strips.num_kv_heads;
        weights_.resize(size_t(blocks * heads * group * kStripTokens));
        sums_.resize(size_t(blocks * heads * group));
        read_.resize(size_t(blocks * heads));
        flat_.assign(rows_.size() * size_t(heads), 0);
        totals_.resize(rows_.size() * size_t(heads * group));
        first_piece_.clear();
        most_blocks_ = 0;
        int64_t before = 0;
        for (size_t r = 0; r < rows_.size(); ++r) {
            PlaneRow& row = rows_[r];
            row.weights = weights_.data() + before * heads * group * kStripTokens;
            row.sums = sums_.data() + before * heads * group;
            row.read = read_.data() + before * heads;
            before += row.num_blocks;
            most_blocks_ = std::max(most_blocks_, row.num_blocks);
            for (int32_t head = 0; head < heads; ++head) {
                first_piece_.push_back(pieces_.size());
                for (int64_t first = 0; first < row.num_blocks; first += kPieceBlocks) {
                    pieces_.push_back({int32_t(r), head, first, std::min(first + kPieceBlocks, row.num_blocks)});
                }
            }
        }
        first_piece_.push_back(pieces_.size());
        partials_.resize(pieces_.size() * size_t(group * args.strips.v_head_dim));
    }

    // From the sums of the blocks of a head: its totals, which values are read, and (returned) whether a softmax is flat.
    bool settle(const AttendArgs& args, const Selection& selection, int64_t index, float* masses) {
        const int64_t group = args.group_size(), heads = args.strips.num_kv_heads;
        const PlaneRow& row = rows_[size_t(index / heads)];
        const int head = int(index % heads);
        BlockSum* sums = row.sums + row.index(head, 0) * group;
        std::fill(masses, masses + row.num_blocks, 0.0f);
        float *of_vector = masses + row.num_blocks, least = std::numeric_limits<float>::infinity();
        for (int64_t m = 0; m < group; ++m) {
            Total& total = totals_[size_t(index * group + m)];
            total = total_of(sums + m, group, row.num_blocks, of_vector);
            const float likeliest = 1.0f / total.denominator;
            if (!(likeliest >= least)) least = likeliest;
            for (int64_t b = 0; b < row.num_blocks; ++b) {
                const float mass = of_vector[b] * likeliest;
                if (!(mass <= masses[b])) masses[b] = mass;  // NaN stays
            }
        }
        choose(masses, row.num_blocks, selection.eps, row.read + row.index(head, 0));
        if (selection.tau == 0 || selection.tau >= 1) return selection.tau > 0;
        return !(least >= selection.tau);
    }

    // Of a vector: the greatest top and what all weights come to beside it; `masses` becomes the part of each block.
    static Total total_of(BlockSum* sums, int64_t stride, int64_t num_blocks, float* masses) {
        float top = sums[0].top, denominator = 0;
        for (int64_t b = 1; b < num_blocks; ++b) {
            const float x = sums[b * stride].top;
            if (top == top && !(x <= top)) top = x;  // NaN is the greatest
        }
        for (int64_t b = 0; b < num_blocks; ++b) {
            BlockSum& block = sums[b * stride];
            block.share = std::exp(block.top - top);
            masses[b] = block.share * block.sum;
            denominator += masses[b];
        }
        return {top, denominator};
    }

    // Leaves out the least likely blocks that have at most `eps` of the probability together.
    void choose(const float* masses, int64_t count, float eps, uint8_t* read) {
        std::fill(read, read + count, uint8_t{1});
        if (eps <= 0) return;
        thread_local std::vector<std::pair<float, int32_t>> unlikely;
        unlikely.clear();
        for (int64_t b = 0; b < count; ++b) {
            if (!(std::fabs(masses[b]) <= std::numeric_limits<float>::max())) return;
            if (masses[b] <= eps) unlikely.emplace_back(masses[b], int32_t(b));
        }
        std::sort(unlikely.begin(), unlikely.end());
        float sum = 0;
        for (const auto& [mass, block] : unlikely) {
            sum += mass;
            if (sum > eps) return;
            read[block] = 0;
        }
    }

    void count(const AttendArgs& args, int64_t* tally) const {
        const int64_t heads = args.strips.num_kv_heads;
        for (size_t i = 0; i < flat_.size(); ++i) {
            const PlaneRow& row = rows_[i / size_t(heads)];
            const uint8_t* read = row.read + row.index(int(i % size_t(heads)), 0);
            tally[0] += 1;
            tally[1] += flat_[i];
            tally[2] += row.num_blocks;
            tally[3] += flat_[i] * row.num_blocks;
            tally[4] += std::count(read, read + row.num_blocks, uint8_t{1});
        }
    }

    // Adds up the pieces of a head, always in the order of the blocks.
    void merge(const AttendArgs& args, int64_t index, float* sum) {
        const int64_t group = args.group_size(), heads = args.strips.num_kv_heads, width = args.strips.v_head_dim;
        const int64_t row = rows_[size_t(index / heads)].row;
        for (int64_t m = 0; m < group; ++m) {
            const Total total = totals_[size_t(index * group + m)];
            std::fill(sum, sum + width, 0.0f);
            for (size_t i = first_piece_[size_t(index)]; i < first_piece_[size_t(index) + 1]; ++i) {
                const float* partial = partials_.data() + (int64_t(i) * group + m) * width;
                for (int64_t d = 0; d < width; ++d) sum[d] += partial[d];
            }
            for (int64_t d = 0; d < width; ++d) sum[d] /= total.denominator;
            const int64_t head = index % heads * group + m;
            const char* source = reinterpret_cast<const char*>(sum);
            kernels().convert(source, DType::float32, args.out.at(row, head), args.out.dtype, width);
            if (args.lse != nullptr) {
                args.lse[row * args.spec.num_q_heads + head] = total.top + std::log(total.denominator);
            }
        }
    }

    std::vector<PlaneRow> rows_;
    std::vector<Piece> pieces_;
    std::vector<size_t> first_piece_;  // of each row's heads
    std::vector<float> weights_, partials_;
    std::vector<BlockSum> sums_;
    std::vector<uint8_t> read_, flat_;  // flat: heads that read the low plane
    std::vector<Total> totals_;
    int64_t most_blocks_ = 0;
};

}  // namespace

void attend_by_planes(const AttendArgs& args, const Selection& selection) {
    if (selection.num_blocks != 0 || selection.rows == nullptr) return;
    thread_local PlaneRows rows;
    rows.run(args, selection);
}

}  // namespace elbowroom
