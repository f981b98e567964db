#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "isa.h"
#include "kernels.h"
#include "pool.h"

namespace elbowroom {
namespace {

constexpr int64_t kBuckets = 1024;
constexpr float kLowest = -30.0f;    // exponents below share the last bucket: 1e-13 of the greatest weight
constexpr float kNothing = -88.0f;   // weights below are 0
constexpr double kSlack = 0.01;      // margin of bounds on exponents; weights are exact to 1e-6
constexpr double kRounding = 1e-10;  // sums of one row in different orders differ by less than this share

int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

// Some neighbouring tokens of a row.
struct Block {
    int64_t first, count;
    float sum;                                 // of the weights, to float precision
    float exponents[kBlock], weights[kBlock];  // (logit - greatest) / temperature, and e to the power of that
};

// One token of a bucket; tokens are ordered by falling logit, then by rising id.
struct Entry {
    uint32_t falling, id;
    float weight;

    Entry() = default;
    Entry(float logit, uint32_t token, float w) : id(token), weight(w) {
        uint32_t bits;
        const float plain = logit + 0.0f;  // -0 and 0 are equal
        std::memcpy(&bits, &plain, sizeof bits);
        falling = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
    }
    bool operator<(const Entry& other) const {
        return falling != other.falling ? falling < other.falling : id < other.id;
    }
};

// Some tokens, such as those up to a place in the order: how many, and their weight.
struct Prefix {
    int64_t count = 0;
    double weight = 0;
};

struct Found {
    Prefix through;
    int64_t token = kBroken;  // kBroken: the end came first
};

// Where a row's scratch lies.
struct Scratch {
    Prefix* buckets;  // [kBuckets + 1]
    double* sums;     // [blocks]
    float* maxima;    // [blocks]
    float* others;    // [blocks]
    Entry* entries;   // [vocab_size]

    Scratch(float* base, int64_t vocab_size) {
        const int64_t blocks = num_blocks(vocab_size);
        buckets = reinterpret_cast<Prefix*>(base);
        sums = reinterpret_cast<double*>(buckets + kBuckets + 1);
        maxima = reinterpret_cast<float*>(sums + blocks);
        others = maxima + blocks;
        entries = reinterpret_cast<Entry*>(others + blocks);
    }

    static int64_t floats(int64_t vocab_size) { return 4 * (kBuckets + 1) + 4 * num_blocks(vocab_size) + 3 * vocab_size; }
};

class Row {
   public:
    Row(const float* logits, int64_t vocab_size, const Draw& draw, float* scratch)
        : x_(logits), size_(vocab_size), num_blocks_(num_blocks(vocab_size)), draw_(draw), scratch_(scratch, vocab_size) {}

    int64_t token(double point) {
        if (!find_greatest()) return kBroken;
        if (draw_.temperature == 0) return best_;
        temperature_ = float(draw_.temperature);
        const bool cuts = draw_.top_k > 0 || draw_.top_p < 1 || draw_.min_p > 0;
        return cuts ? draw_cut(point) : draw_plain(point);
    }

   private:
    bool find_greatest() {
        kernels_.block_maxima(x_, size_, scratch_.maxima);
        int64_t best = 0;
        bool has_nan = false;
        for (int64_t block = 0; block < num_blocks_; ++block) {
            has_nan |= std::isnan(scratch_.maxima[block]);
            if (scratch_.maxima[block] > scratch_.maxima[best]) best = block;
        }
        top_ = scratch_.maxima[best];
        if (has_nan || !std::isfinite(top_)) return false;
        best_ = std::find(x_ + best * kBlock, x_ + size_, top_) - x_;
        return true;
    }

    float exponent(float logit) const { return (logit - top_) / temperature_; }

    void weigh(int64_t number, Block& block) const {
        block.first = number * kBlock, block.count = std::min(kBlock, size_ - block.first);
        block.sum = kernels_.weigh_block(x_ + block.first, block.count, top_, temperature_, block.exponents, block.weights);
    }

    // Calls visit(block) for every block with an exponent of at least `floor`.
    template <class Visit>
    void visit_blocks(float floor, Visit visit) const {
        Block block;
        for (int64_t number = 0; number < num_blocks_; ++number) {
            if (exponent(scratch_.maxima[number]) < floor) continue;
            weigh(number, block);
            visit(static_cast<const Block&>(block));
        }
    }

    // Walks through all tokens in the order of their ids.
    int64_t draw_plain(double point) const {
        std::fill(scratch_.sums, scratch_.sums + num_blocks_, 0.0);
        visit_blocks(kNothing, [&](const Block& block) { scratch_.sums[block.first / kBlock] = double(block.sum); });
        const double mark = point * std::accumulate(scratch_.sums, scratch_.sums + num_blocks_, 0.0);
        double sum = 0;
        int64_t number = 0;
        while (number + 1 < num_blocks_ && sum + scratch_.sums[number] <= mark) sum += scratch_.sums[number++];
        Block block;
        weigh(number, block);
        int64_t last = best_;
        for (int64_t i = 0; i < block.count; ++i) {
            if (block.weights[i] > 0) last = block.first + i;
            if ((sum += double(block.weights[i])) > mark) break;
        }
        return last;
    }

    // Walks through the tokens that are kept, the most likely first.
    int64_t draw_cut(double point) {
        double total = 0, kept = 0;  // of all tokens, and of those that min-p keeps
        if (draw_.top_k == 0 || draw_.min_p > 0) {
            visit_blocks(kLowest - 15, [&](const Block& block) {
                total += double(block.sum);
                if (draw_.min_p > 0) kept += weight_above(block, draw_.min_p);
            });
        }
        fill_buckets(lowest_kept(total));
        if (draw_.top_k > 0) total = find([&](Prefix end) { return end.count >= draw_.top_k; }).through.weight;
        double limit = total;
        if (draw_.top_p < 1) {
            limit = find([&](Prefix end) { return end.weight >= draw_.top_p * total; }).through.weight;
        }
        if (draw_.min_p > 0) limit = std::min(limit, kept);
        // What is cut off is never drawn, however the sums above were rounded.
        const double mark = std::min(point, 1 - kRounding) * limit;
        const Found found = find([&](Prefix end) { return end.weight > mark; });
        return found.token == kBroken ? best_ : found.token;
    }

    static double weight_above(const Block& block, double least) {
        constexpr int kLanes = 4;  // sums that do not wait for one another
        double sums[kLanes] = {};
        for (int64_t i = 0; i < block.count; ++i) {
            const double weight = double(block.weights[i]);
            sums[i % kLanes] += weight >= least ? weight : 0.0;
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Returns an exponent below which nothing is kept; minus infinity if unknown.
    float lowest_kept(double total) const {
        if (draw_.top_k > num_blocks_) return -std::numeric_limits<float>::infinity();
        if (draw_.top_k > 0) {  // so many blocks have a token at least as likely as this
            float* last = scratch_.others + draw_.top_k - 1;
            std::copy(scratch_.maxima, scratch_.maxima + num_blocks_, scratch_.others);
            std::nth_element(scratch_.others, last, scratch_.others + num_blocks_, std::greater<float>());
            return exponent(*last);
        }
        // Tokens lighter than this weigh less together than what top-p cuts off, or are cut off by min-p.
        return float(std::log(std::max((1 - draw_.top_p) * total / double(size_), draw_.min_p)) - kSlack);
    }

    // Sums up weights and counts of the tokens from exponent `floor` on, in buckets of equal width.
    void fill_buckets(float floor) {
        floor_ = floor;
        scale_ = float(kBuckets) / std::clamp(-floor, 1e-6f, -kLowest);
        std::fill(scratch_.buckets, scratch_.buckets + kBuckets + 1, Prefix{});
        visit_blocks(floor_, [&](const Block& block) {
            int32_t numbers[kBlock];
            for (int64_t i = 0; i < block.count; ++i) numbers[i] = bucket_of(block.exponents[i]);
            for (int64_t i = 0; i < block.count; ++i) {
                Prefix& bucket = scratch_.buckets[numbers[i]];
                ++bucket.count, bucket.weight += double(block.weights[i]);
            }
        });
    }

    // Rises as exponents fall; the last bucket has everything that is left down to the floor, kBuckets what lies below.
    int32_t bucket_of(float exponent) const {
        const float place = -exponent * scale_;
        const float inside = place < float(kBuckets - 1) ? place : float(kBuckets - 1);
        return int32_t(exponent < floor_ ? float(kBuckets) : inside);
    }

    // Returns the first token for which reached(prefix that ends with it) holds; from there on it must hold.
    template <class Reached>
    Found find(Reached reached) const {
        Prefix before;
        for (int32_t bucket = 0; bucket < kBuckets; ++bucket) {
            const Prefix& held = scratch_.buckets[bucket];
            const Prefix end{before.count + held.count, before.weight + held.weight};
            if (end.count > before.count && reached(end)) {
                const Found found = find_among(gather(bucket), before, reached);
                if (found.token != kBroken) return found;
            }
            before = end;
        }
        return {before, kBroken};
    }

    // Gathers the tokens of one bucket as entries; returns how many.
    int64_t gather(int32_t bucket) const {
        // Bounds that are a bucket too wide on either side: exact ones are not needed to pass over a block.
        const float low = bucket == kBuckets - 1 ? floor_ : -float(bucket + 2) / scale_;
        const float high = float(1 - bucket) / scale_;
        int64_t size = 0;
        Block block;
        for (int64_t number = 0; number < num_blocks_; ++number) {
            if (exponent(scratch_.maxima[number]) < low || !has_between(number, low, high)) continue;
            weigh(number, block);
            for (int64_t i = 0; i < block.count; ++i) {
                if (bucket_of(block.exponents[i]) != bucket) continue;
                const int64_t token = block.first + i;
                scratch_.entries[size++] = Entry(x_[token], uint32_t(token), block.weights[i]);
            }
        }
        return size;
    }

    // Whether a block has an exponent in low .. high.
    bool has_between(int64_t number, float low, float high) const {
        const int64_t first = number * kBlock, count = std::min(kBlock, size_ - first);
        int found = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float place = exponent(x_[first + i]);
            found |= int(place >= low) & int(place <= high);
        }
        return found != 0;
    }

    // Halves the entries until few are left, then sorts those.
    template <class Reached>
    Found find_among(int64_t size, Prefix before, Reached reached) const {
        Entry *begin = scratch_.entries, *end = begin + size;
        while (end - begin > 32) {
            Entry* middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end);
            Prefix half = before;
            for (const Entry* each = begin; each < middle; ++each) ++half.count, half.weight += double(each->weight);
            if (reached(half)) {
                end = middle;
            } else {
                begin = middle, before = half;
            }
        }
        std::sort(begin, end);
        for (const Entry* each = begin; each < end; ++each) {
            ++before.count, before.weight += double(each->weight);
            if (reached(before)) return {before, int64_t{each->id}};
        }
        return {before, kBroken};
    }

    const SamplingTable& kernels_ = kernels().sampling;
    const float* x_;
    const int64_t size_, num_blocks_;
    const Draw& draw_;
    const Scratch scratch_;
    float top_ = 0, temperature_ = 1, floor_ = 0, scale_ = 1;
    int64_t best_ = 0;
};

struct Job {
    const float* logits;
    int64_t row_stride, vocab_size;
    const Draw* draws;
    const uint64_t* positions;
    int64_t* tokens;
};

void sample_row(void* context, int64_t row, float* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const Draw& draw = job.draws[row];
    const double point = draw.temperature == 0 ? 0 : uniform(draw.seed, draw.sample, job.positions[row]);
    job.tokens[row] = Row(job.logits + row * job.row_stride, job.vocab_size, draw, scratch).token(point);
}

}  // namespace

double uniform(uint64_t seed, uint64_t sample, uint64_t position) {
    uint64_t x = seed ^ (sample * 0xD1342543DE82EF95u) ^ (position * 0x9E3779B97F4A7C15u);
    for (int round = 0; round < 2; ++round) {
        x += 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
    }
    return double(x >> 11) * 0x1p-53;
}

std::vector<int64_t> sample(const float* logits, int64_t row_stride, int64_t vocab_size, const Draw* draws,
                            const std::vector<uint64_t>& positions) {
    std::vector<int64_t> tokens(positions.size());
    Job job{logits, row_stride, vocab_size, draws, positions.data(), tokens.data()};
    Pool::instance().run(int64_t(tokens.size()), Scratch::floats(vocab_size), sample_row, &job);
    return tokens;
}

}  // namespace elbowroom
