// A transformer's feed-forward block with its norm and residual, its wide hidden layer never leaving the cache.
//
//   out = [x +] W2 (value * gelu(gate)) + b2,  [value, gate] = W1 layer_norm(x) + b1    Shazeer, arXiv 2002.05202 (GEGLU)
//
// A thread takes some rows; for 64 hidden units at a time it computes values and gates, multiplies them and adds what
// they give to the rows' outputs. In float32.

#include "vectors.h"

enum { ROWS = 48, UNITS = 64 };

struct FeedForward {
    const float *x, *norm_weight, *norm_bias;  // (rows, C), (C)
    const float *w1, *b1, *w2, *b2;            // packed, (2 hidden), packed, (C')
    float *out;                                // (rows, C')
    ll rows, width, hidden, width_out, residual;
    double eps;
};

static void normalise(const FeedForward &call, const float *x, float *out) {
    vec sum = set(0), squares = sum;
    for (ll c = 0; c < call.width; c += LANES) sum = sum + load(x + c);
    const vec mean = set(total(sum) / call.width);
    for (ll c = 0; c < call.width; c += LANES) {
        const vec d = load(x + c) - mean;
        squares = fma(d, d, squares);
    }
    const vec spread = set(1.0f / __builtin_sqrtf(total(squares) / call.width + (float)call.eps));
    for (ll c = 0; c < call.width; c += LANES) {
        const vec d = (load(x + c) - mean) * spread;
        store(out + c, fma(d, load(call.norm_weight + c), load(call.norm_bias + c)));
    }
}

extern "C" void pw_feed_forward(const FeedForward *given) {
    const FeedForward &call = *given;
    const ll width = call.width, hidden = call.hidden, wide = call.width_out;
    const ll blocks = ceil_div(ceil_div(call.rows, ROWS), omp_get_max_threads()) * omp_get_max_threads();
    const ll each = ceil_div(call.rows, blocks);
#pragma omp parallel
    {
        float *inputs = room(each * (width + 2 * UNITS));
        float *values = inputs + each * width, *gates = values + each * UNITS;
#pragma omp for schedule(static)
        for (ll first = 0; first < call.rows; first += each) {
            const ll count = first + each < call.rows ? each : call.rows - first;
            float *out = call.out + first * wide;
            for (ll i = 0; i < count; i++) {
                const float *x = call.x + (first + i) * width;
                normalise(call, x, inputs + i * width);
                for (ll c = 0; c < wide; c += LANES)
                    store(out + i * wide + c,
                          call.residual ? load(call.b2 + c) + load(x + c) : load(call.b2 + c));
            }
            for (ll h = 0; h < hidden; h += UNITS) {
                const float *w1 = call.w1 + h * 2 * width;
                product(count, inputs, w1, values, width, UNITS, width, UNITS);
                product(count, inputs, w1 + UNITS * width, gates, width, UNITS, width, UNITS);
                for (ll i = 0; i < count; i++)
                    for (ll c = 0; c < UNITS; c += LANES) {
                        float *value = values + i * UNITS + c, *gate = gates + i * UNITS + c;
                        const vec g = gelu(load(gate) + load(call.b1 + hidden + h + c));
                        store(value, (load(value) + load(call.b1 + h + c)) * g);
                    }
                product<true>(count, values, call.w2 + h * wide, out, UNITS, wide, UNITS, wide);
            }
        }
    }
}

// W1 (2 hidden, C) in runs of 64 units, values then gates, each in the blocks that `product` reads
extern "C" void pw_pack_gated(const float *w1, float *u, ll hidden, ll width) {
#pragma omp parallel for schedule(static)
    for (ll h = 0; h < hidden; h++)
        for (ll half = 0; half < 2; half++) {
            const Column to = column(h % UNITS, width, UNITS);
            float *unit = u + (h / UNITS * 2 + half) * UNITS * width + to.first;
            for (ll c = 0; c < width; c++) unit[c * to.row] = w1[(half * hidden + h) * width + c];
        }
}

// W2 (C', hidden) in runs of 64 units, each in the blocks that `product` reads
extern "C" void pw_pack_out(const float *w2, float *u, ll wide, ll hidden) {
#pragma omp parallel for schedule(static)
    for (ll o = 0; o < wide; o++) {
        const Column to = column(o, UNITS, wide);
        for (ll h = 0; h < hidden; h++) u[h / UNITS * UNITS * wide + to.first + h % UNITS * to.row] = w2[o * hidden + h];
    }
}
