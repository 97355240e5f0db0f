// Self-attention over short sequences, read from and written to where the projections put them.
//
//   out = softmax(scale q k') v, for every sequence and head        Vaswani et al., arXiv 1706.03762, equation 1
//
// A sequence's tokens need not be neighbours in memory: those of a pixel over frames lie a whole picture apart. A head's
// keys are turned once, queries go through in runs whose weights stay in the first cache. Sums are in float32.

#include "vectors.h"

enum { QUERIES = 42 };

struct Attention {
    const void *q, *k, *v;
    void *out;
    ll outer, outer_step, inner, inner_step;  // sequences: outer x inner, and their distances in numbers
    ll tokens, token_step, heads, width;      // width of a head
    float scale;
};

// of the vector that begins at j, those that are tokens
static inline lanes tokens_at(ll j, ll tokens) {
    const ll left = tokens < j ? 0 : tokens - j;
    return first_of(left < LANES ? left : (ll)LANES);
}

// a row of `tokens` weights, `padded` long, in place; what is beyond the tokens becomes 0
static inline void softmax(float *row, ll tokens, ll padded) {
    vec top = set(-INFINITY), sum = set(0);
    for (ll j = 0; j < padded; j += LANES) {
        if (j + LANES > tokens) store(row + j, choose(tokens_at(j, tokens), load(row + j), set(-INFINITY)));
        top = most(top, load(row + j));
    }
    top = set(largest(top));
    for (ll j = 0; j < padded; j += LANES) {
        vec e = exponential(load(row + j) - top);
        if (j + LANES > tokens) e = choose(tokens_at(j, tokens), e, set(0));
        sum = sum + e;
        store(row + j, e);
    }
    const vec share = set(1.0f / total(sum));
    for (ll j = 0; j < padded; j += LANES) store(row + j, share * load(row + j));
}

template <typename T> static void attend(const Attention &call) {
    const ll tokens = call.tokens, padded = ceil_div(tokens, MULTIPLE) * MULTIPLE, width = call.width;
#pragma omp parallel
    {
        float *keys = room(2 * padded * width + QUERIES * (2 * width + padded));
        float *values = keys + padded * width, *queries = values + padded * width;
        float *weights = queries + QUERIES * width, *results = weights + QUERIES * padded;
#pragma omp for schedule(static)
        for (ll number = 0; number < call.outer * call.inner * call.heads; number++) {
            const ll sequence = number / call.heads;
            const ll start = sequence / call.inner * call.outer_step + sequence % call.inner * call.inner_step +
                             number % call.heads * width;
            const T *q = (const T *)call.q + start, *k = (const T *)call.k + start, *v = (const T *)call.v + start;
            T *out = (T *)call.out + start;
            for (ll d = 0; d < width; d += LANES) {
                const Column to = column(d, tokens, width);
                for (ll j = 0; j < tokens; j++)
                    store(values + to.first + j * to.row, load(v + j * call.token_step + d));
                for (ll j = 0; j < padded; j += LANES) {
                    vec r[LANES];
                    for (ll i = 0; i < LANES; i++)
                        r[i] = j + i < tokens ? load(k + (j + i) * call.token_step + d) : set(0);
                    transpose(r);
                    const Column at = column(j, width, padded);
                    for (ll i = 0; i < LANES; i++) store(keys + at.first + (d + i) * at.row, r[i]);
                }
            }
            for (ll first = 0; first < tokens; first += QUERIES) {
                const ll count = first + QUERIES < tokens ? QUERIES : tokens - first;
                for (ll i = 0; i < count; i++)
                    for (ll d = 0; d < width; d += LANES)
                        store(queries + i * width + d,
                              set(call.scale) * load(q + (first + i) * call.token_step + d));
                product(count, queries, keys, weights, width, padded, width, padded);
                for (ll i = 0; i < count; i++) softmax(weights + i * padded, tokens, padded);
                product(count, weights, values, results, tokens, width, padded, width);
                for (ll i = 0; i < count; i++)
                    for (ll d = 0; d < width; d += LANES)
                        store(out + (first + i) * call.token_step + d, load(results + i * width + d));
            }
        }
    }
}

extern "C" void pw_attend(const Attention *call, int is_bf16) {
    is_bf16 ? attend<bf16>(*call) : attend<float>(*call);
}
